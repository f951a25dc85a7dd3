"""API keys: whose key it is, what the file may hold, and that a service others can reach has keys."""

import hashlib
import hmac
import pickle
import re

import pytest

from rayclip.errors import UserError
from rayclip.serve.config import AuthConfig
from rayclip.serve.middleware.auth import KEYS_VARIABLE, ApiKeys, new_key, require_keys

ANN, BOB = "rc_" + "a" * 43, "rc_" + "b" * 43


def line(name, key):
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def loaded(path, text, variable=None):
    path.write_text(text)
    return ApiKeys.load(AuthConfig(keys_file=str(path)), {} if variable is None else {KEYS_VARIABLE: variable})


@pytest.fixture
def keys(tmp_path):
    return loaded(tmp_path / "keys", f"{line('ann', ANN)}\n{line('bob', BOB)}\n")


# Whose key it is


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "name"),
    [
        (f"Bearer {ANN}", None, "ann"),
        (f"bearer  {BOB} ", None, "bob"),
        (None, BOB, "bob"),
        (None, f" {BOB} ", "bob"),
        ("Basic YTpi", ANN, "ann"),
        ("Bearer unknown", ANN, "ann"),
        (f"Bearer {ANN}", BOB, "ann"),
        (None, None, None),
        ("", "", None),
        ("Bearer", None, None),
        ("Bearer ", None, None),
        (ANN, None, None),
        (f"Basic {ANN}", None, None),
        (f"Bearer {ANN}x", None, None),
        (f"Bearer {ANN[:-1]}", None, None),
        (f"Bearer {ANN.upper()}", None, None),
        (f"Bearer {ANN} {ANN}", None, None),
        (None, hashlib.sha256(ANN.encode()).hexdigest(), None),
        (None, "é\ud800", None),
    ],
)
def test_a_key_is_found_in_either_header(keys, authorization, x_api_key, name):
    assert keys.name_of(authorization, x_api_key) == name


def test_every_entry_is_compared_whichever_fits(keys, monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    for key, name in ((ANN, "ann"), (BOB, "bob"), ("rc_x", None)):
        compared.clear()
        assert keys.name_of(f"Bearer {key}", None) == name
        assert len(compared) == 2
        assert all(len(digest) == 32 for pair in compared for digest in pair)


def test_an_empty_key_is_nobodys_even_where_its_hash_is_listed(tmp_path):
    keys = loaded(tmp_path / "keys", line("nobody", ""))
    assert len(keys) == 1
    assert keys.name_of("Bearer ", "") is None


def test_no_keys_let_nobody_in():
    keys = ApiKeys.load(AuthConfig(), {})
    assert (len(keys), bool(keys)) == (0, False)
    assert keys.name_of(f"Bearer {ANN}", ANN) is None


def test_keys_travel_between_processes(keys):
    assert pickle.loads(pickle.dumps(keys)).name_of(None, ANN) == "ann"


# The file and the variable


def test_comments_and_empty_lines_are_no_keys(tmp_path):
    text = f"# keys\n\n   \n  {line('ann', ANN)}  # since May\r\n#{line('bob', BOB)}\n"
    keys = loaded(tmp_path / "keys", text)
    assert len(keys) == 1
    assert keys.name_of(None, ANN) == "ann"
    assert keys.name_of(None, BOB) is None


def test_hexadecimal_digits_may_be_capitals(tmp_path):
    name, _, digest = line("ann", ANN).partition(" sha256:")
    assert loaded(tmp_path / "keys", f"{name}\tsha256:{digest.upper()}").name_of(None, ANN) == "ann"


def test_file_and_variable_add_up(tmp_path):
    keys = loaded(tmp_path / "keys", line("ann", ANN), f" {line('bob', BOB)} , {line('eve', 'rc_e')},")
    assert [keys.name_of(None, key) for key in (ANN, BOB, "rc_e")] == ["ann", "bob", "eve"]
    assert len(keys) == 3


def test_the_variable_alone_is_enough():
    keys = ApiKeys.load(AuthConfig(), {KEYS_VARIABLE: line("ann", ANN), "OTHER": line("bob", BOB)})
    assert (keys.name_of(None, ANN), keys.name_of(None, BOB)) == ("ann", None)


def test_two_keys_of_one_name_both_work(tmp_path):
    keys = loaded(tmp_path / "keys", f"{line('ann', ANN)}\n{line('ann', BOB)}")
    assert len(keys) == 2
    assert keys.name_of(None, ANN) == keys.name_of(None, BOB) == "ann"


@pytest.mark.parametrize(
    "entry",
    [
        ANN,
        f"ann {ANN}",
        f"ann sha256:{ANN}",
        f"ann sha256:{'0' * 63}",
        f"ann sha256:{'0' * 65}",
        f"ann sha256: {'0' * 64}",
        f"ann sha512:{'0' * 64}",
        f"sha256:{'0' * 64}",
        f"ann smith sha256:{'0' * 64}",
        f"-ann sha256:{'0' * 64}",
        f"{'a' * 65} sha256:{'0' * 64}",
        f"ann sha256:{'0' * 63}g",
    ],
)
def test_a_malformed_entry_names_its_place_and_not_the_key(tmp_path, entry):
    path = tmp_path / "keys"
    with pytest.raises(UserError) as caught:
        loaded(path, f"# keys\n{line('bob', BOB)}\n{entry}\n")
    assert str(caught.value) == f"{path}, line 3: not of the form 'NAME sha256:HEX' with 64 hexadecimal digits"
    assert caught.value.__cause__ is None
    with pytest.raises(UserError, match=f"^{KEYS_VARIABLE}, entry 2: not of the form") as caught:
        ApiKeys.load(AuthConfig(), {KEYS_VARIABLE: f"{line('bob', BOB)},{entry}"})
    assert ANN not in str(caught.value)


def test_a_file_that_cannot_be_read_is_a_users_mistake(tmp_path):
    missing = AuthConfig(keys_file=str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"^auth.keys_file: cannot read '.*missing': No such file or directory$"):
        ApiKeys.load(missing, {KEYS_VARIABLE: line("ann", ANN)})
    with pytest.raises(UserError, match=r"cannot read .* Is a directory"):
        ApiKeys.load(AuthConfig(keys_file=str(tmp_path)), {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not a text file in UTF-8"):
        ApiKeys.load(AuthConfig(keys_file=str(tmp_path / "binary")), {})


# New keys


def test_a_new_key_works_with_its_line(tmp_path):
    key, entry = new_key("ann")
    assert re.fullmatch(r"rc_[A-Za-z0-9_-]{43}", key)  # 43 characters of 6 bits hold 256 bits
    assert entry == line("ann", key)
    assert loaded(tmp_path / "keys", entry).name_of(f"Bearer {key}", None) == "ann"
    assert len({new_key("ann")[0] for _ in range(100)}) == 100


@pytest.mark.parametrize("name", ["", "ann smith", "#ann", ".ann", "ann,bob", "a" * 65, "ann\n", "é"])
def test_a_name_that_the_file_could_not_hold_is_refused(name):
    with pytest.raises(UserError, match=r"^key name "):
        new_key(name)


# Who needs keys

LOOPBACK = ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "LOCALHOST")
REACHABLE = ("0.0.0.0", "::", "192.168.1.5", "8.8.8.8", "example.org", "", "localhost.example.org", "127.0.0.1.nip.io")


@pytest.mark.parametrize("host", LOOPBACK)
def test_on_loopback_keys_are_needed_where_there_are_some(host, keys):
    assert require_keys(host, AuthConfig(), ApiKeys([])) is False
    assert require_keys(host, AuthConfig(), keys) is True


@pytest.mark.parametrize("host", REACHABLE)
def test_a_service_that_others_reach_must_have_keys(host, keys):
    assert require_keys(host, AuthConfig(), keys) is True
    with pytest.raises(UserError) as caught:
        require_keys(host, AuthConfig(), ApiKeys([]))
    message = str(caught.value)
    assert message.startswith(f"host '{host}' can be reached from elsewhere and there are no API keys")
    for way_out in ("auth.keys_file", KEYS_VARIABLE, "rayclip serve key NAME", "127.0.0.1", "auth.required=false"):
        assert way_out in message
    assert "\n" not in message


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_what_the_settings_say_holds_on_any_host(host, keys):
    assert require_keys(host, AuthConfig(required=False), ApiKeys([])) is False
    assert require_keys(host, AuthConfig(required=False), keys) is False
    assert require_keys(host, AuthConfig(required=True), keys) is True
    with pytest.raises(UserError, match=r"^auth.required is true, but there are no keys"):
        require_keys(host, AuthConfig(required=True), ApiKeys([]))
