"""API keys: who may ask. The service knows the keys' hashes only."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rayclip.errors import UserError
from rayclip.serve.config import AuthConfig

_logger = logging.getLogger("ray.serve")

KEYS_VARIABLE = "RAYCLIP_API_KEYS"
"""Environment variable with entries as in the file, separated by commas."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_ENTRY = re.compile(rf"({_NAME})\s+sha256:([0-9A-Fa-f]{{64}})")


class _Entry(NamedTuple):
    name: str
    digest: bytes


class ApiKeys:
    """The keys that are known. Several may have one name, so that a key can be replaced by another in peace."""

    def __init__(self, entries: Iterable[tuple[str, bytes]]) -> None:
        """From names and the SHA-256 of their keys, 32 bytes each."""
        self._entries = tuple(_Entry(*entry) for entry in entries)

    @classmethod
    def load(cls, config: AuthConfig, environment: Mapping[str, str]) -> "ApiKeys":
        """The keys of the file and of RAYCLIP_API_KEYS together. Raises UserError, which never repeats an entry."""
        entries = [] if config.keys_file is None else _read_file(config.keys_file)
        for i, text in enumerate(environment.get(KEYS_VARIABLE, "").split(","), start=1):
            entries += _parse(text, f"{KEYS_VARIABLE}, entry {i}")
        return cls(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def name_of(self, authorization: str | None, x_api_key: str | None) -> str | None:
        """Whose key a request shows in its Authorization (Bearer) or its x-api-key header; none: nobody's."""
        scheme, _, token = (authorization or "").strip().partition(" ")
        presented = (token.strip() if scheme.lower() == "bearer" else "", (x_api_key or "").strip())
        names = [self._name_of_key(key) for key in presented if key]
        return next((name for name in names if name is not None), None)

    def _name_of_key(self, key: str) -> str | None:
        digest = _digest(key)
        found = None
        for entry in self._entries:  # all of them: how long it takes must not say where a key stands
            if hmac.compare_digest(entry.digest, digest):
                found = entry.name
        return found


class KeyRing:
    """The keys as their file has them now: one that is added or taken out counts without a restart.

    A file that cannot be read, or has a wrong line, changes nothing: the keys of before go on to count, and the log
    says so once. Where keys were once required they stay required, so that an emptied file opens nothing.
    """

    def __init__(self, config: AuthConfig, environment: Mapping[str, str], host: str) -> None:
        """Raises UserError as `ApiKeys.load` and `require_keys` do; `host` is the address listened on."""
        self._config, self._environment = config, environment
        self._seen = self._look()
        self._keys = ApiKeys.load(config, environment)
        self.required = require_keys(host, config, self._keys)
        self.problem: str | None = None
        """Why the file of now does not count."""

    def name_of(self, authorization: str | None, x_api_key: str | None) -> str | None:
        """Whose key a request shows; none: nobody's."""
        return self._keys.name_of(authorization, x_api_key)

    async def reload(self) -> None:
        """Read the file where it has changed since it was read."""
        if self._config.keys_file is None or (seen := await asyncio.to_thread(self._look)) == self._seen:
            return
        self._seen = seen
        try:
            self._keys = await asyncio.to_thread(ApiKeys.load, self._config, self._environment)
        except UserError as error:
            self.problem = str(error)
            _logger.error("the API keys stay as they were: %s", error)
            return
        self.problem = None
        self.required = self.required or (self._config.required is None and bool(self._keys))
        _logger.info("API keys read anew: there are %d", len(self._keys))

    def _look(self) -> tuple[int, ...] | None:
        """What differs once the file has changed; none where it is not there."""
        try:
            found = Path(self._config.keys_file or "").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def new_key(name: str) -> tuple[str, str]:
    """A new key, shown only now, and the line for the file of keys. Raises UserError for a name that cannot be one."""
    if not re.fullmatch(_NAME, name):
        raise UserError(f"key name '{name}' must be 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit")
    key = f"rc_{secrets.token_urlsafe(32)}"
    return key, f"{name} sha256:{_digest(key).hex()}"


def require_keys(host: str, config: AuthConfig, keys: ApiKeys) -> bool:
    """Whether requests need a key: as config.required says, or else where there are keys.

    Raises UserError where keys are needed and there are none: config.required says so, or it says nothing and `host`,
    the address listened on, can be reached from elsewhere.
    """
    if config.required and not keys:
        raise UserError(f"auth.required is true, but there are no keys: set auth.keys_file or {KEYS_VARIABLE}")
    if config.required is not None:
        return config.required
    if not keys and not _is_loopback(host):
        raise UserError(
            f"host '{host}' can be reached from elsewhere and there are no API keys: set auth.keys_file or "
            f"{KEYS_VARIABLE} ('rayclip serve key NAME' makes a key), listen on 127.0.0.1, or set auth.required=false"
        )
    return bool(keys)


def _digest(key: str) -> bytes:
    # A plain SHA-256 is right here: unlike a password, a key has 256 random bits, and nobody can try them all. A slow
    # hash would only cost time at each request.
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _read_file(file: str) -> list[_Entry]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"auth.keys_file: cannot read '{file}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"auth.keys_file: '{file}' is not a text file in UTF-8") from None
    return [entry for i, line in enumerate(lines, start=1) for entry in _parse(line, f"{file}, line {i}")]


def _parse(text: str, where: str) -> list[_Entry]:
    """The entry in a line; none in an empty line or a comment."""
    text = text.partition("#")[0].strip()
    if not text:
        return []
    match = _ENTRY.fullmatch(text)
    if match is None:
        # Without the text: people paste the key itself where its hash belongs.
        raise UserError(f"{where}: not of the form 'NAME sha256:HEX' with 64 hexadecimal digits")
    return [_Entry(match[1], bytes.fromhex(match[2]))]


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
