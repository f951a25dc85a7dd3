"""Whatever strangers send: an answer in the service's own form, the same processes, and no more memory than before."""

import base64
import collections
import contextlib
import hashlib
import http.server
import itertools
import json
import socket
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rayclip.serve.middleware.auth import new_key
from tests.serve.evil_images import image, png
from tests.serve.hostile import FAMILIES, SSRF, good_bodies
from tests.serve.wire import (
    JSON,
    MEGABYTE,
    PNG,
    Answer,
    Case,
    connect,
    form,
    post,
    problem,
    receive,
    request,
    send,
    wrong_form,
)

DEPLOYMENTS = ("Ingress", "ImageEncoder", "TextEncoder", "Coordinator")
GROWTH = 400 * MEGABYTE
"""Of all replicas together, after the warm-up. Not a leak is what the C library gives back late: a decoded picture of
49 million pixels has 147 MB and two are decoded at a time, and the objects of 10 MB of JSON have up to 300 MB. Over ten
rounds of all of this the sum went up and down by 300 MB, without a trend; a leak of one of them each time is gigabytes.
"""
STRICT_TIMEOUT_S = 8


class Target:
    """A service, and how it was before anything was sent to it."""

    def __init__(self, service, headers=()):
        self.service = service
        self.url = service.url
        self.headers = headers
        self._good = self._ask_well()
        self._failures = self._count_failures()
        self._pids = self._replicas()
        self._bytes = 0

    def warm_up(self):
        """What makes the replicas take the memory that they keep: the largest of each kind of request, and at once."""
        large = [case for case in FAMILIES["bombs"]() if "49 million" in case.name]
        large += [case for case in FAMILIES["ten_megabytes_of_json"]() if "objects" in case.name or "keys" in case.name]
        large += [case for case in FAMILIES["too_much"]() if "may be" in case.name]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda case: send(self.url, case.data), large))
        self._bytes = self.memory()

    def memory(self):
        """Resident memory of all replicas, in bytes."""
        return sum(p.memory_info().rss for name in DEPLOYMENTS for p in self.service.replicas(name))

    def problems(self, cases, timeout=60):
        """Send them all; what was wrong with the answers."""
        found = []
        for case in cases:
            try:
                found.append(problem(case, send(self.url, case.data, timeout)))
            except TimeoutError:
                found.append(f"{case.name}: no answer in {timeout} s")
        return [each for each in found if each]

    def check(self):
        """Nothing has died, been replaced, slowed down or grown."""
        assert self._ask_well() == self._good
        assert self._replicas() == self._pids
        assert self._count_failures() == self._failures
        if self._bytes:
            assert self.memory() - self._bytes < GROWTH

    def metrics(self):
        """The lines of /metrics."""
        return send(self.url, request("GET", "/metrics", headers=self.headers)).body.decode().splitlines()

    def count(self, name, **labels):
        """The sum of a metric's samples that have these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.metrics() if line.startswith(name) and all(each in line for each in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def _count_failures(self):
        return [line for line in self.metrics() if "rayclip_requests_total" in line and 'status="5' in line]

    def _ask_well(self):
        body = good_bodies()["/v1/zero-shot"]
        answer = send(self.url, post("/v1/zero-shot", body, (*JSON, *self.headers)))
        assert answer.status == 200, answer
        return json.loads(answer.body)

    def _replicas(self):
        return {name: {process.pid for process in self.service.replicas(name)} for name in DEPLOYMENTS}


@pytest.fixture(scope="module")
def target(service):
    """The service that all tests share, warmed up; its label sets are as before at the end."""
    target = Target(service)
    sets_before = label_sets(service)
    target.warm_up()
    yield target
    for name in label_sets(service) - sets_before:
        service.ask("DELETE", "/v1/label-sets/" + urllib.parse.quote(name, safe=""))


def label_sets(service):
    return {each["name"] for each in service.ask("GET", "/v1/label-sets")[1]["data"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_requests_harm_nothing(target, family):
    assert target.problems(FAMILIES[family]()) == []
    target.check()


def test_there_are_more_than_a_thousand():
    large = ("bombs", "ten_megabytes_of_json")  # which take seconds to be made
    assert sum(len(list(cases())) for name, cases in FAMILIES.items() if name not in large) > 1_000


def sensible(case):
    """A generated case whose parts that a schema cannot tell are good, so that it gets as far as the model."""
    if isinstance(case.body, dict) and case.media_type == "application/json":
        good = good_bodies().get(case.path, {})
        for key in ("model", "modality", "dimensions", "templates", "images", "label_set", "multi_label"):
            case.body.pop(key, None)
        case.body.update({key: good[key] for key in ("image", "inputs", "query") if key in good})
        for key in ("labels", "parameters", "candidates"):
            if key in good and not case.body.get(key):
                case.body[key] = good[key]
    return case


@pytest.mark.parametrize("mode", ["sensible", "positive", "negative"])
def test_the_specification_is_true(target, mode):
    schema = schemathesis.openapi.from_url(f"{target.url}/openapi.json")
    generation = schemathesis.GenerationMode.NEGATIVE if mode == "negative" else schemathesis.GenerationMode.POSITIVE
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    statuses = collections.Counter()
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(
            derandomize=True,  # the same cases each time
            max_examples=25,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=generation))
        def hold(case):
            response = (sensible(case) if mode == "sensible" else case).call(timeout=60)
            statuses[response.status_code] += 1
            case.validate_response(response, checks=checks)
            if response.status_code >= 400:
                kind = response.headers["content-type"][0]
                answer = Answer(response.status_code, {"content-type": kind}, response.content)
                sent = (response.request.url + repr(response.request.body)).encode()
                assert wrong_form(answer, sent) is None, response.content

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # what takes nothing cannot be given what is wrong
            hold()
    assert sum(statuses.values()) > 100, statuses
    assert (statuses[200] > 20) == (mode != "negative"), statuses
    target.check()


def test_half_requests_and_clients_that_leave(target):
    whole = post("/v1/zero-shot", good_bodies()["/v1/zero-shot"])
    texts = post("/v1/embeddings", {"input": [f"text {i}" for i in range(500)]})
    connections = []
    for part in range(1, 40):  # they stay, as slow clients do
        connections.append(connect(target.url))
        connections[-1].sendall(whole[: len(whole) * part // 40])
    for number in (0, 1, 100):
        for data in (whole, texts, request("GET", "/openapi.json"), request("GET", "/metrics")):
            with connect(target.url) as connection:
                connection.sendall(data)
                connection.recv(number)  # and then it leaves in the middle of the answer
    for data in (whole, texts):
        with connect(target.url) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)  # to the proxy that is a client which has left, or no client
            assert receive(connection).status in (200, 400, None)
    target.check()
    for connection in connections:
        connection.close()
    target.check()


def test_a_connection_may_be_used_again_after_an_error(target):
    data = [
        post("/v1/embeddings", {"input": 5}),
        request("GET", "/nothing"),
        request("PATCH", "/v1/models"),
        post("/v1/zero-shot", b"{"),
        post("/v1/embeddings", {"input": "a"}),
    ]
    with connect(target.url) as connection:
        statuses = []
        for each in data:
            connection.sendall(each.replace(b"Connection: close\r\n", b""))
            statuses.append(receive(connection).status)
    assert statuses == [422, 404, 405, 422, 200]


# With keys, short bodies, short waits, narrow queues, and pictures by URL from one host


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """The allowed server: what it answers is not to be trusted either. It also stands for the network behind it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        kind, _, rest = self.path[1:].partition("/")
        with contextlib.suppress(OSError):  # the service hangs up on most of these
            getattr(self, kind, self.nothing)(urllib.parse.unquote(rest))
        self.close_connection = True

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def nothing(self, _):
        self.answer(404, b"secret")

    def image(self, _):
        self.answer(200, image())

    def secret(self, _):
        self.answer(200, b"secret")

    def to(self, url):
        self.answer(302, b"secret", Location=url)

    def around(self, number):
        self.answer(307, Location=f"/around/{int(number or 0) + 1}")

    def status(self, status):
        self.answer(int(status), b"secret")

    def bomb(self, _):
        self.answer(200, png(b"\0", 50_000, 50_000))

    def packed(self, _):
        self.answer(200, b"\x1f\x8b" + b"secret" * 100, Content_Encoding="gzip")

    def endless(self, _):
        self.send_response(200)
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(b"\0" * 100_000)

    def slow(self, _):
        self.send_response(200)
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"\x89")
            time.sleep(0.1)

    def long(self, _):
        self.answer(200, b"", Content_Length="99999999999999999999")

    def cut(self, _):
        self.answer(200, b"\x89PNG", Content_Length="5000")

    def headers_without_end(self, _):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(10_000):
            self.wfile.write(f"X-{i}: {'a' * 1000}\r\n".encode())

    def garbage(self, _):
        self.wfile.write(b"\0\xff" * 1000)

    def silence(self, _):
        time.sleep(3)


@contextlib.contextmanager
def elsewhere():
    """The allowed server, and another that is not."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) for _ in range(2)]
    for server in servers:
        server.asked, server.daemon_threads = [], True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def strict(start_service, model_folder, tmp_path_factory):
    """A service that allows little; gives its target, its key, the two servers and the folder of its label sets."""
    folder = tmp_path_factory.mktemp("strict")
    key, line = new_key("tester")
    (folder / "keys").write_text(line + "\n")
    with elsewhere() as (allowed, hidden):
        service = start_service(
            f"model={model_folder}",
            f"auth.keys_file={folder / 'keys'}",
            f"state_folder={folder / 'state'}",
            f"request_timeout_s={STRICT_TIMEOUT_S}",
            "poll_s=0.3",
            "cors_origins=['https://page.example']",
            "limits.max_body_bytes=100000",
            f"urls.allowed_hosts=['127.0.0.1:{allowed.server_port}']",
            "urls.schemes=[http]",
            "urls.allow_private=true",
            "urls.max_bytes=100000",
            "urls.timeout_s=1",
            "max_waiting=30",
            # One at a time: the tiny model is so fast that nothing would ever wait for it otherwise.
            "image_encoder.max_batch_size=1",
            "image_encoder.max_waiting=4",
            "text_encoder.max_batch_size=1",
            "text_encoder.max_waiting=50000",
            "text_encoder.num_cpus=0.5",
        )
        target = Target(service, (("X-Api-Key", key),))
        target.key, target.allowed, target.hidden, target.folder = key, allowed, hidden, folder
        yield target
        service.stop()


def test_only_the_right_key_opens(strict):
    key = strict.key
    wrong = {
        "none": [],
        "empty": [("Authorization", "")],
        "only the scheme": [("Authorization", "Bearer")],
        "an empty key": [("Authorization", "Bearer "), ("X-Api-Key", "")],
        "without the scheme": [("Authorization", key)],
        "another scheme": [("Authorization", f"Basic {key}")],
        "basic": [("Authorization", "Basic " + base64.b64encode(f"tester:{key}".encode()).decode())],
        "its name": [("X-Api-Key", "tester")],
        "its hash": [("X-Api-Key", hashlib.sha256(key.encode()).hexdigest())],
        "less a letter": [("X-Api-Key", key[:-1])],
        "a letter more": [("X-Api-Key", key + "a")],
        "in capitals": [("X-Api-Key", key.upper())],
        "in quotes": [("X-Api-Key", f'"{key}"')],
        "twice in one": [("X-Api-Key", f"{key}, {key}")],
        "as a cookie": [("Cookie", f"x-api-key={key}; authorization=Bearer {key}")],
        "as a user": [("X-Forwarded-User", "tester"), ("X-Real-IP", "127.0.0.1")],
        "no text": [("Authorization", b"Bearer \xff\xfe")],
        "long": [("X-Api-Key", "a" * 100_000)],
        "many": [("X-Api-Key", str(i)) for i in range(80)],
        "null": [("Authorization", "Bearer null"), ("X-Api-Key", "undefined")],
        "sql": [("X-Api-Key", "' OR '1'='1")],
    }
    refused = frozenset({401})
    cases = [
        Case(f"{name} {path}", request("GET", path, headers=tuple(given)), refused)
        for name, given in wrong.items()
        for path in ("/v1/models", "/metrics")
    ]
    cases += [
        Case(path, request(method, path, b"{}", JSON), refused)
        for method, path in itertools.product(
            ("POST",),
            ("/", "/docs", "/page/app.js", "/openapi.json"),
        )
    ]
    cases += [
        Case(path, request(method, path, b"{}", JSON), refused)
        for method, path in itertools.product(
            ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"),
            (
                f"/v1/embeddings?api_key={key}",
                "/v1/label-sets/a",
                "/V1/MODELS",
                "//v1/models",
                "/healthz/../v1/models",
                "/healthz/",
                "/docs/../metrics",
                "/openapi.json/metrics",
                "/nothing",
            ),
        )
    ]
    # What is open is only what it says: the page's files and nothing above them.
    cases += [
        Case(path, request("GET", path), frozenset({404}))
        for path in ("/page/../v1/models", "/page/..%2fv1%2fmodels", "/page/%2e%2e/metrics", "/page//v1/models")
    ]
    assert strict.problems(cases) == []
    for right in (("X-Api-Key", key), ("Authorization", f"Bearer {key}"), ("authorization", f"bEARER   {key}  ")):
        assert send(strict.url, request("GET", "/v1/models", headers=(right,))).status == 200
    answer = send(strict.url, request("GET", "/v1/models"))
    assert answer.headers["www-authenticate"] == "Bearer"
    strict.check()


def test_keys_are_read_anew_without_a_restart(strict):
    file = strict.folder / "keys"
    before = file.read_text()
    late, line = new_key("late")

    def until(key, status):
        deadline = time.monotonic() + 20
        while send(strict.url, request("GET", "/v1/models", headers=(("X-Api-Key", key),))).status != status:
            assert time.monotonic() < deadline, f"not {status} within 20 s"
            time.sleep(0.1)

    try:
        until(late, 401)
        file.write_text(f"{before}{line}\n")
        until(late, 200)
        file.write_text(f"{line}\n")
        until(strict.key, 401)
        until(late, 200)
        file.write_text(f"{before}no line of a key\n")  # a slip of the editor locks nobody out, and lets nobody in
        headers = (("X-Api-Key", late),)
        deadline = time.monotonic() + 20
        while (
            b"rayclip_api_keys_stale{"
            not in (stale := send(strict.url, request("GET", "/metrics", headers=headers)).body)
            or b" 1.0" not in stale.partition(b"rayclip_api_keys_stale{")[2].partition(b"\n")[0]
        ):
            assert time.monotonic() < deadline, stale
            time.sleep(0.1)
        until(late, 200)
        until(strict.key, 401)
        file.unlink()
        until(late, 200)
    finally:
        file.write_text(before)
    until(strict.key, 200)
    until(late, 401)
    strict.check()


def test_a_page_that_is_allowed_may_read_the_headers(strict):
    origin = ("Origin", "https://page.example")
    answer = send(strict.url, post("/v1/embeddings", {"input": "a"}, (*JSON, *strict.headers, origin)))
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert exposed >= {"x-model-version", "x-warning", "server-timing", "retry-after"}
    refused = send(strict.url, request("GET", "/v1/models", headers=(origin,)))
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")


def test_long_bodies_are_cut_off(strict):
    blank = b" " * 100_000
    part = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    multipart = (("Content-Type", "multipart/form-data; boundary=B"),)
    for headers, start in ((JSON, b""), (PNG, b""), (multipart, part)):
        chunk = b"186a0\r\n" + (start + blank)[:100_000] + b"\r\n"
        head = request("POST", "/v1/zero-shot", b"", (*headers, *strict.headers, ("Transfer-Encoding", "chunked")))
        with connect(strict.url) as connection:
            connection.sendall(head)
            with contextlib.suppress(OSError):  # chunks without end, until it hangs up
                for _ in range(100):
                    connection.sendall(chunk)
            assert receive(connection).status in (413, None)
        answer = send(strict.url, head + chunk + chunk)
        assert (answer.status, wrong_form(answer)) == (413, None)
    # Refused by its length: not a byte of it needs to come.
    for number in (100_001, 10**18):
        given = (*JSON, *strict.headers, ("Content-Length", str(number)))
        answer = send(strict.url, request("POST", "/v1/zero-shot", b"", given), timeout=5)
        assert (answer.status, wrong_form(answer)) == (413, None)
    given = (*JSON, *strict.headers)
    assert send(strict.url, post("/v1/embeddings", b" " * 99_985 + b'{"input": "a"}', given)).status == 200
    strict.check()


def test_slow_bodies_are_the_clients_fault(strict):
    starts = {
        "half a body": post("/v1/zero-shot", good_bodies()["/v1/zero-shot"], (*JSON, *strict.headers))[:-10],
        "half of another": post("/v1/embeddings", {"input": "a"}, (*JSON, *strict.headers))[:-1],
        "half a form": post(
            "/v1/zero-shot",
            form(("labels", b"a")),
            (("Content-Type", "multipart/form-data; boundary=B"), *strict.headers),
        )[:-5],
        "chunks without end": request(
            "POST", "/v1/embeddings", b"1\r\n{\r\n", (*JSON, *strict.headers, ("Transfer-Encoding", "chunked"))
        ),
    }
    connections = {}
    for name, data in starts.items():
        connections[name] = connect(strict.url, STRICT_TIMEOUT_S + 10)
        connections[name].sendall(data)
    for _ in range(2 * STRICT_TIMEOUT_S - 4):  # a byte now and then must not keep it waiting
        connections["chunks without end"].sendall(b"1\r\n \r\n")
        time.sleep(0.5)
    for name, connection in connections.items():
        answer = receive(connection)
        assert (name, answer.status, wrong_form(answer)) == (name, 408, None)
        connection.close()
    strict.check()


def test_urls_lead_nowhere_but_to_the_allowed_host(strict):
    allowed, hidden = (f"127.0.0.1:{server.server_port}" for server in (strict.allowed, strict.hidden))
    tricks = [
        *SSRF,
        f"http://{hidden}/secret",
        f"http://{allowed}@{hidden}/secret",
        f"http://{hidden}#@{allowed}/secret",
        f"http://{hidden}\\@{allowed}/secret",
        f"http://{hidden}%00{allowed}/secret",
        f"http://2130706433:{strict.hidden.server_port}/secret",
        f"https://{allowed}/image",
        f"ftp://{allowed}/image",
        f"http://localhost:{strict.allowed.server_port}/picture",
        f"http://[::ffff:127.0.0.1]:{strict.hidden.server_port}/secret",
    ]
    urls = [
        *tricks,
        *(f"http://{allowed}/to/{urllib.parse.quote(trick, safe='')}" for trick in tricks if trick.isascii()),
    ]
    urls += [f"http://{allowed}/{kind}" for kind in vars(Elsewhere) if kind in _BAD]
    urls += [f"http://{allowed}/status/{status}" for status in (201, 204, 206, 304, 401, 403, 500, 503)]

    def case(url):
        body = {"image": url, "labels": ["a"]}
        return Case(url[:100], post("/v1/zero-shot", body, (*JSON, *strict.headers)), frozenset({422}))

    def try_one(url):
        return strict.problems([case(url)])

    with ThreadPoolExecutor(4) as threads:  # fewer than may wait for the image tower
        assert [found for found in threads.map(try_one, urls) if found] == []
    assert strict.hidden.asked == []
    body = {"image": f"http://{allowed}/image", "labels": ["a"]}
    assert send(strict.url, post("/v1/zero-shot", body, (*JSON, *strict.headers))).status == 200
    strict.check()


_BAD = (
    "nothing",
    "secret",
    "around",
    "bomb",
    "packed",
    "endless",
    "slow",
    "long",
    "cut",
    "headers_without_end",
    "garbage",
    "silence",
)


def test_names_of_label_sets_stay_in_their_folder(strict):
    names = [
        "..",
        ".",
        "../../x",
        "/etc/x",
        "a\0b",
        "a" * 200,
        "~",
        "%2e%2e",
        "\\..\\x",
        "\r\n",
        "\u202e",
        "CON",
        "-rf",
        "*",
    ]
    body = json.dumps({"labels": ["a"]}).encode()
    kept = []
    for name in names:
        path = "/v1/label-sets/" + urllib.parse.quote(name, safe="")
        answer = send(strict.url, request("PUT", path, body, (*JSON, *strict.headers)))
        assert problem(Case(name, b""), answer) is None
        if answer.status == 200:
            kept.append(name)
            assert json.loads(send(strict.url, request("GET", path, headers=strict.headers)).body)["name"] == name
    assert len(kept) >= 10
    files = [path for path in strict.folder.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {strict.folder, strict.folder / "state" / "label_sets"}
    for name in kept:
        path = "/v1/label-sets/" + urllib.parse.quote(name, safe="")
        assert send(strict.url, request("DELETE", path, headers=strict.headers)).status == 204
    assert list((strict.folder / "state" / "label_sets").iterdir()) == []
    strict.check()


def test_what_a_client_asked_for_that_left_is_not_computed(strict):
    def texts(name, number):
        return post("/v1/embeddings", {"input": [f"{name} {i}" for i in range(number)]}, (*JSON, *strict.headers))

    before = settled(strict)
    hold, leave, each = 500, 6, 500
    with connect(strict.url) as first:
        first.sendall(texts("hold", hold))
        time.sleep(0.1)
        others = []
        for number in range(leave):
            others.append(connect(strict.url))
            others[-1].sendall(texts(number, each))
        time.sleep(0.1)
        for connection in others:
            connection.close()
        assert receive(first).status == 200  # what it had asked for is computed, by one text a batch
    computed = settled(strict, before + hold) - before
    # The queue takes one text of each in turn, so some of theirs were computed before they left.
    assert hold <= computed < hold + leave * each / 2, computed
    strict.check()


def settled(target, least=0.0):
    """Texts that the text tower has computed, once nothing waits; a busy replica is late to tell of the `least`."""
    count, last, deadline = -1.0, -2.0, time.monotonic() + 60
    while (
        (count < least and time.monotonic() < deadline)
        or count - last > 5  # probes of health go on
        or target.count("rayclip_waiting", tower="text")
    ):
        time.sleep(1)
        last, count = count, target.count("rayclip_batch_size_sum", tower="text")
    return count


def answers_at_once(target, data, number):
    """The answers to `number` equal requests at the same time, and the seconds that each 429 took."""

    def ask(_):
        start.wait()
        started = time.monotonic()
        answer = send(target.url, data)
        return answer, time.monotonic() - started

    start = threading.Barrier(number)
    with ThreadPoolExecutor(number) as threads:
        found = list(threads.map(ask, range(number)))
    return [answer for answer, _ in found], [s for answer, s in found if answer.status == 429]


@pytest.mark.parametrize("queue", ["of the image tower", "of the ingress"])
def test_a_full_queue_answers_429(strict, queue):
    if queue == "of the image tower":
        images = [base64.b64encode(image("JPEG", (100, 100), quality=10)).decode()] * 8
        data = post("/v1/zero-shot", {"images": images, "labels": ["a"]}, (*JSON, *strict.headers))
        answers, seconds = answers_at_once(strict, data, 24)
    else:
        texts = [f"{i}" for i in range(100)]
        data = post("/v1/embeddings", {"input": texts}, (*JSON, *strict.headers))
        answers, seconds = answers_at_once(strict, data, 60)
    statuses = collections.Counter(answer.status for answer in answers)
    assert set(statuses) == {200, 429}, statuses
    for answer in answers:
        if answer.status == 429:
            assert wrong_form(answer) is None
            assert answer.headers["retry-after"] == "1"
            assert json.loads(answer.body)["error"]["type"] == "rate_limit_error"
    assert min(seconds) < 1
    strict.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Request-ID", b"\xff"),
        ("X-Request-Timeout-Seconds", b"\xff"),
        ("X-Request-Timeout-Seconds", "0.000001"),
        ("X-Request-Disconnect-Disabled", b"\xff"),
        ("Serve-Multiplexed-Model-Id", b"\xff"),
        ("X-Session-Id", b"\xff"),
    ],
)
def test_rays_own_headers_do_nothing(target, name, value):
    case = Case(name, post("/v1/embeddings", {"input": "a"}, (*JSON, (name, value))), frozenset({200}))
    assert target.problems([case]) == []


def test_pictures_as_large_as_a_body_may_be(target):
    photo = image("PNG", (2000, 2000))  # of noise: 12 MB
    nothing = base64.b64encode(b"\0" * 14 * MEGABYTE).decode()
    several = [base64.b64encode(image("PNG", (700, 700))).decode()] * 8
    cases = [
        Case("12 MB", post("/v1/zero-shot?labels=a", photo, PNG), frozenset({200})),
        Case("8 of 1.5 MB", post("/v1/zero-shot", {"images": several[:8], "labels": ["a"]}), frozenset({200})),
        Case("zeros", post("/v1/zero-shot", {"image": nothing, "labels": ["a"]}), frozenset({422})),
    ]
    assert target.problems(cases) == []


def test_who_waits_for_a_matrix_gets_it_though_who_asked_first_has_left(strict):
    data = post(
        "/v1/zero-shot",
        {**good_bodies()["/v1/zero-shot"], "labels": [f"shared {i}" for i in range(500)]},
        (*JSON, *strict.headers),
    )
    with connect(strict.url) as first:
        first.sendall(data)
        time.sleep(0.1)
        with ThreadPoolExecutor(3) as threads:
            waiting = [threads.submit(send, strict.url, data) for _ in range(3)]
            time.sleep(0.1)
            first.close()
            assert [each.result().status for each in waiting] == [200, 200, 200]
