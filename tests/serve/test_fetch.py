"""Pictures by URL, from a server on loopback; and the ways in which a URL may try to reach what it must not."""

import asyncio
import functools
import gzip
import ipaddress
import socket
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from yarl import URL

from rayclip.errors import UserError
from rayclip.serve import fetch
from rayclip.serve.config import UrlConfig
from rayclip.serve.fetch import MAX_URL_CHARS, UrlFetcher
from rayclip.serve.images import RequestError

BODY = b"a picture"
HOST = "pictures.test"
PUBLIC = "93.184.216.34"


def in_loop(test):
    """Runs an async test in a loop of its own."""

    @functools.wraps(test)
    def wrapper(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return wrapper


class FakeResolver(AbstractResolver):
    """Names by a table; of several answers each call gets the next."""

    def __init__(self, **answers):
        self.answers = {name.replace("_", "."): list(of_name) for name, of_name in answers.items()}
        self.calls = []

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.calls.append(host)
        answers = self.answers.get(host.removesuffix("."))
        if answers is None:
            raise OSError(-2, "Name or service not known")
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses.split()
        ]

    async def close(self):
        pass


class Server:
    """An HTTP server that answers as it is told and remembers what it was asked."""

    def __init__(self):
        self.requests = []
        self.routes = {"/cat": lambda request: web.Response(body=BODY)}

    async def handle(self, request):
        self.requests.append(request)
        answer = self.routes[request.path](request)
        return await answer if asyncio.iscoroutine(answer) else answer

    def redirect(self, path, location, status=302):
        self.routes[path] = lambda request: web.Response(status=status, headers={"Location": location})


@asynccontextmanager
async def serving(server, host="127.0.0.1", port=0):
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        server.port = runner.addresses[0][1]
        server.url = f"http://{HOST}:{server.port}"
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def fetching(*allowed_hosts, resolver=None, **settings):
    settings = {"schemes": ("http",), "allow_private": True, "timeout_s": 5, **settings}
    fetcher = UrlFetcher(
        UrlConfig(allowed_hosts=allowed_hosts, **settings), resolver or FakeResolver(pictures_test=["127.0.0.1"])
    )
    try:
        yield fetcher
    finally:
        await fetcher.close()


@asynccontextmanager
async def both(resolver=None, **settings):
    """A server and a fetcher that may fetch from it."""
    async with serving(Server()) as server, fetching(f"{HOST}:{server.port}", resolver=resolver, **settings) as fetcher:
        yield server, fetcher


INTERNALS = ("127.", "169.254", "10.0.", "Errno", "Cannot connect", "Error(", "getaddrinfo", "Name or service")


async def refused(fetcher, url, code):
    with pytest.raises(RequestError) as caught:
        await fetcher.fetch(url, "images[1]")
    error = caught.value
    assert (error.status, error.code, error.param) == (422, code, "images[1]")
    assert not any(word in error.message for word in INTERNALS)
    assert error.__cause__ is None
    return error.message


# What works


@in_loop
async def test_a_picture_is_fetched():
    async with both() as (server, fetcher):
        assert await fetcher.fetch(f"{server.url}/cat?x=1#y", "image") == BODY
        (request,) = server.requests
        assert (request.method, request.path_qs) == ("GET", "/cat?x=1")
        assert request.headers["Host"] == f"{HOST}:{server.port}"


@in_loop
async def test_urls_are_off_where_no_host_is_allowed():
    async with serving(Server()) as server, fetching() as fetcher:
        message = await refused(fetcher, f"{server.url}/cat", "urls_off")
        assert message == "URLs are switched off here; send pictures in base64 or as files"
        assert server.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@in_loop
async def test_redirects_are_followed(status):
    async with both(max_redirects=2) as (server, fetcher):
        server.redirect("/one", "two", status)
        server.redirect("/two", f"{server.url}/cat", status)
        assert await fetcher.fetch(f"{server.url}/one", "image") == BODY
        assert [request.path for request in server.requests] == ["/one", "/two", "/cat"]


@in_loop
async def test_cookies_proxies_and_compression_are_left_out(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    packed = gzip.compress(bytes(1_000_000))
    headers = {"Set-Cookie": "a=b", "Content-Encoding": "gzip"}
    async with both(max_bytes=len(packed)) as (server, fetcher):
        server.routes["/packed"] = lambda request: web.Response(body=packed, headers=headers)
        for _ in range(2):
            assert await fetcher.fetch(f"{server.url}/packed", "image") == packed
        for request in server.requests:
            assert request.headers["Accept-Encoding"] == "identity"
            assert "Cookie" not in request.headers
            assert "Authorization" not in request.headers


@in_loop
async def test_close_closes_the_connections():
    async with both() as (server, fetcher):
        await fetcher.fetch(f"{server.url}/cat", "image")
        session = fetcher._session
        await fetcher.close()
        assert session.closed
    await UrlFetcher(UrlConfig()).close()


# Which URLs


@pytest.mark.parametrize(
    ("url", "code", "word"),
    [
        ("https://pictures.test/cat", "url_not_allowed", "must begin with http"),
        ("file:///etc/passwd", "url_not_allowed", "must begin with http"),
        ("ftp://pictures.test/cat", "url_not_allowed", "must begin with http"),
        ("gopher://pictures.test:70/_", "url_not_allowed", "must begin with http"),
        ("//pictures.test/cat", "url_not_allowed", "must begin with http"),
        ("http:///cat", "url_invalid", "no host"),
        ("http://", "url_invalid", "no host"),
        ("http://ann:secret@pictures.test/cat", "url_not_allowed", "name or a password"),
        ("http://ann@pictures.test/cat", "url_not_allowed", "name or a password"),
        ("http://:@pictures.test/cat", "url_not_allowed", "name or a password"),
        ("http://pictures.test:8080/cat", "url_not_allowed", "host and port"),
        ("http://pictures.test:443/cat", "url_not_allowed", "host and port"),
        ("http://pictures.test:0/cat", "url_not_allowed", "host and port"),
        ("http://other.test/cat", "url_not_allowed", "host and port"),
        ("http://sub.pictures.test/cat", "url_not_allowed", "host and port"),
        ("http://xpictures.test/cat", "url_not_allowed", "host and port"),
        ("http://pictures.test.evil.test/cat", "url_not_allowed", "host and port"),
        ("http://pictures.test../cat", "url_not_allowed", "host and port"),
        ("http://evil.test/http://pictures.test/cat", "url_not_allowed", "host and port"),
        ("http://evil.test#@pictures.test/cat", "url_not_allowed", "host and port"),
        ("http://evil.test?@pictures.test/cat", "url_not_allowed", "host and port"),
        ("http://evil.test\\@pictures.test/cat", "url_invalid", "not well formed"),
        ("http://pictures.test:99999/cat", "url_invalid", "not well formed"),
        ("http://[::1/cat", "url_invalid", "not well formed"),
        ("http://pictures.test/" + "x" * MAX_URL_CHARS, "url_invalid", "1 to 2048 characters"),
        ("", "url_invalid", "1 to 2048 characters"),
    ],
)
@in_loop
async def test_other_urls_are_refused_before_anything_is_resolved(url, code, word):
    resolver = FakeResolver(pictures_test=["127.0.0.1"])
    async with fetching(HOST, resolver=resolver) as fetcher:
        assert word in await refused(fetcher, url, code)
    assert resolver.calls == []


@pytest.mark.parametrize(
    ("entry", "url", "matches"),
    [
        ("example.org", "http://example.org/", True),
        ("example.org", "http://EXAMPLE.Org:80/", True),
        ("Example.ORG", "https://example.org./a", True),
        ("example.org.", "https://example.org:443/", True),
        ("example.org", "https://example.org:80/", False),
        ("example.org", "http://www.example.org/", False),
        (".example.org", "http://www.example.org/", True),
        (".example.org", "http://a.b.EXAMPLE.org./", True),
        (".example.org", "http://example.org/", True),
        (".example.org", "http://badexample.org/", False),
        (".example.org", "http://example.org.evil/", False),
        ("example.org:8080", "http://example.org:8080/", True),
        ("example.org:8080", "http://example.org/", False),
        (".example.org:8080", "https://a.example.org:8080/", True),
        ("bücher.example", "http://xn--bcher-kva.example/", True),
        ("xn--bcher-kva.example", "http://BÜCHER.example/", True),
        (".bücher.example", "http://www.Bücher.example./", True),
        ("127.0.0.1:81", "http://127.0.0.1:81/", True),
        ("[::1]:81", "http://[0:0::1]:81/", True),
    ],
)
def test_the_list_of_hosts(entry, url, matches):
    assert fetch._parse_entry(entry).matches(URL(url)) is matches


@pytest.mark.parametrize(
    "entry",
    ["", ".", "..", "*.example.org", "http://example.org", "example.org/", "a@b", "a b", "a:", "a:b", "a:99999", "::1"],
)
def test_an_entry_that_is_no_host_is_a_users_mistake(entry):
    with pytest.raises(UserError, match=r"^urls.allowed_hosts: '.*' must be HOST, HOST:PORT, or with a dot in front"):
        UrlFetcher(UrlConfig(allowed_hosts=("example.org", entry)))


# Which addresses

PRIVATE = (
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2001::1",
    "2001:db8::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
)


def test_public_addresses_are_told_from_others():
    public = (PUBLIC, "8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450::8", "::ffff:8.8.8.8")
    assert [address for address in public if not fetch._is_public(ipaddress.ip_address(address))] == []
    assert [address for address in PRIVATE if fetch._is_public(ipaddress.ip_address(address))] == []


@pytest.mark.parametrize("address", PRIVATE)
@in_loop
async def test_a_name_with_an_address_that_is_not_public_is_refused(address, monkeypatch):
    monkeypatch.setattr(aiohttp.connector.aiohappyeyeballs, "start_connection", lambda **_: pytest.fail("connected"))
    resolver = FakeResolver(pictures_test=[address], mixed_test=[f"{PUBLIC} {address}"])
    async with fetching(HOST, "mixed.test", resolver=resolver, allow_private=False) as fetcher:
        for host in (HOST, "mixed.test", f"{HOST}."):
            message = await refused(fetcher, f"http://{host}/cat", "url_not_allowed")
            assert message == "the URL's host has an address that is not public"
    assert len(resolver.calls) == 3


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1.", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "１２７.0.0.1"]
)
@in_loop
async def test_an_address_that_is_written_out_is_refused_even_where_it_is_listed(host):
    entries = ("127.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]")
    async with fetching(*entries, allow_private=False) as fetcher:
        message = await refused(fetcher, f"http://{host}/cat", "url_not_allowed")
        assert message == "the URL's host has an address that is not public"


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "017700000001", "0"])
@in_loop
async def test_other_spellings_of_an_address_gain_nothing(host):
    async with serving(Server()) as server:
        # The system's resolver knows them all.
        async with fetching(f"127.0.0.1:{server.port}") as fetcher:
            await refused(fetcher, f"http://{host}:{server.port}/cat", "url_not_allowed")
        fetcher = UrlFetcher(UrlConfig(allowed_hosts=(f"{host}:{server.port}",), schemes=("http",)))
        with pytest.raises(RequestError) as caught:
            await fetcher.fetch(f"http://{host}:{server.port}/cat", "image")
        assert caught.value.code in ("url_not_allowed", "url_unreachable")
        await fetcher.close()
        assert server.requests == []


@in_loop
async def test_names_of_this_machine_are_refused_by_the_systems_resolver():
    async with serving(Server()) as server:
        entry = f"localhost:{server.port}"
        fetcher = UrlFetcher(UrlConfig(allowed_hosts=(entry,), schemes=("http",)))
        await refused(fetcher, f"http://{entry}/cat", "url_not_allowed")
        await fetcher.close()
        assert server.requests == []
        fetcher = UrlFetcher(UrlConfig(allowed_hosts=(entry,), schemes=("http",), allow_private=True))
        assert await fetcher.fetch(f"http://{entry}/cat", "image") == BODY
        await fetcher.close()


@in_loop
async def test_what_was_checked_is_what_is_connected_to(monkeypatch):
    connected = []

    async def start_connection(addr_infos, **options):
        connected.extend(info[4][0] for info in addr_infos)
        raise OSError(111, "Connection refused")

    monkeypatch.setattr(aiohttp.connector.aiohappyeyeballs, "start_connection", start_connection)
    # Rebinding: the name is public when it is checked, and ours from then on.
    resolver = FakeResolver(pictures_test=[f"{PUBLIC} 2606:4700::1111", "127.0.0.1"])
    async with fetching(HOST, resolver=resolver, allow_private=False) as fetcher:
        await refused(fetcher, f"http://{HOST}/cat", "url_unreachable")
        assert resolver.calls == [HOST]
        assert set(connected) == {PUBLIC, "2606:4700::1111"}
        await refused(fetcher, f"http://{HOST}/cat", "url_not_allowed")
        assert "127.0.0.1" not in connected


@in_loop
async def test_a_name_is_resolved_once_and_its_first_answer_connected_to():
    resolver = FakeResolver(pictures_test=["127.0.0.1", "127.0.0.2"])
    async with both(resolver) as (server, fetcher), serving(Server(), "127.0.0.2", server.port) as inner:
        assert await fetcher.fetch(f"{server.url}/cat", "image") == BODY
        assert (len(server.requests), len(inner.requests), len(resolver.calls)) == (1, 0, 1)


# Redirects


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://169.254.169.254/latest/meta-data/", "url_not_allowed"),
        ("//169.254.169.254/", "url_not_allowed"),
        ("http://other.test/cat", "url_not_allowed"),
        ("http://pictures.test/cat", "url_not_allowed"),
        ("https://pictures.test/cat", "url_not_allowed"),
        ("file:///etc/passwd", "url_not_allowed"),
        ("javascript:alert(1)", "url_not_allowed"),
        ("data:image/png;base64,QUJD", "url_not_allowed"),
        ("http://[::1", "url_invalid"),
        ("/" + "x" * MAX_URL_CHARS, "url_invalid"),
    ],
)
@in_loop
async def test_a_redirect_leads_nowhere_that_a_url_may_not(location, code):
    async with both() as (server, fetcher):
        server.redirect("/away", location)
        message = await refused(fetcher, f"{server.url}/away", code)
        assert "other.test" not in message
        assert len(server.requests) == 1


@in_loop
async def test_a_redirect_with_a_password_is_refused():
    async with both() as (server, fetcher):
        server.redirect("/away", f"http://ann:secret@{HOST}:{server.port}/cat")
        assert "secret" not in await refused(fetcher, f"{server.url}/away", "url_not_allowed")
        assert len(server.requests) == 1


@in_loop
async def test_a_redirect_without_a_location_is_refused():
    async with both() as (server, fetcher):
        server.routes["/away"] = lambda request: web.Response(status=302)
        await refused(fetcher, f"{server.url}/away", "url_invalid")


@in_loop
async def test_each_name_on_the_way_must_be_public(monkeypatch):
    # As if this machine were the internet, and the rest of its network were not.
    monkeypatch.setattr(fetch, "_is_public", lambda address: str(address) == "127.0.0.1")
    resolver = FakeResolver(pictures_test=["127.0.0.1"], inner_test=["127.0.0.2"])
    async with serving(Server()) as server, serving(Server(), "127.0.0.2", server.port) as inner:
        entries = (f"{HOST}:{server.port}", f"inner.test:{server.port}", f"127.0.0.2:{server.port}")
        async with fetching(*entries, resolver=resolver, allow_private=False) as fetcher:
            assert await fetcher.fetch(f"{server.url}/cat", "image") == BODY
            for path, host in (("/name", "inner.test"), ("/address", "127.0.0.2")):
                server.redirect(path, f"http://{host}:{server.port}/cat")
                await refused(fetcher, server.url + path, "url_not_allowed")
            assert inner.requests == []


@pytest.mark.parametrize("max_redirects", [0, 1, 3])
@in_loop
async def test_a_loop_of_redirects_ends(max_redirects):
    async with both(max_redirects=max_redirects) as (server, fetcher):
        server.redirect("/loop", "/loop")
        message = await refused(fetcher, f"{server.url}/loop", "url_redirects")
        assert message == f"the URL redirects more than {max_redirects} times"
        assert len(server.requests) == max_redirects + 1


# Bodies and time


@pytest.mark.parametrize("status", [201, 204, 206, 304, 401, 404, 500])
@in_loop
async def test_only_a_200_is_a_picture(status):
    async with both() as (server, fetcher):
        server.routes["/cat"] = lambda request: web.Response(status=status)
        message = await refused(fetcher, f"{server.url}/cat", "url_status")
        assert message == f"the URL was answered with status {status}"


async def stream(request, chunks, pause_s=0.0, **headers):
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    for chunk in chunks:
        await response.write(chunk)
        await asyncio.sleep(pause_s)
    return response


@pytest.mark.parametrize("streamed", [False, True])
@in_loop
async def test_the_longest_body_is_held_to_the_byte(streamed):
    async with both(max_bytes=len(BODY)) as (server, fetcher):
        for body in (BODY, BODY + b"!"):
            server.routes["/cat"] = lambda request, body=body: (
                stream(request, [body[:4], body[4:]]) if streamed else web.Response(body=body)
            )
            if body == BODY:
                assert await fetcher.fetch(f"{server.url}/cat", "image") == BODY
            else:
                message = await refused(fetcher, f"{server.url}/cat", "url_too_large")
                assert message == "the URL's body is longer than 9 bytes"


@in_loop
async def test_an_endless_body_is_cut_off():
    async def endless(request):
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(10_000))

    async with both(max_bytes=100_000, timeout_s=15) as (server, fetcher):
        server.routes["/cat"] = endless
        await refused(fetcher, f"{server.url}/cat", "url_too_large")


@asynccontextmanager
async def raw_server(answer, pause_s=0.0):
    """A server that sends these bytes, whatever it is asked, and hangs up."""

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        await asyncio.sleep(pause_s)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", "url_too_large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", "url_unreachable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nshort", "url_unreachable"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort", "url_unreachable"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "url_unreachable"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "url_unreachable"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "url_unreachable"),
        (b"", "url_unreachable"),
    ],
)
@in_loop
async def test_a_server_that_breaks_the_rules(answer, code):
    async with raw_server(answer) as port, fetching(f"{HOST}:{port}", max_bytes=1000) as fetcher:
        await refused(fetcher, f"http://{HOST}:{port}/", code)


@in_loop
async def test_no_more_is_read_than_was_declared():
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and much more"
    async with raw_server(answer) as port, fetching(f"{HOST}:{port}", max_bytes=1000) as fetcher:
        try:
            assert await fetcher.fetch(f"http://{HOST}:{port}/", "image") == b"hello"
        except RequestError as error:  # where the rest is seen to be no further answer
            assert error.code == "url_unreachable"


@in_loop
async def test_a_host_that_is_not_there_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with fetching(f"{HOST}:{port}", "nowhere.test") as fetcher:
        for url in (f"http://{HOST}:{port}/cat", "http://nowhere.test/cat"):
            assert await refused(fetcher, url, "url_unreachable") == "the URL cannot be fetched"


@in_loop
async def test_the_time_limit_is_for_all_of_it():
    async def slow_step(request):
        await asyncio.sleep(0.2)
        return web.Response(status=302, headers={"Location": "/step"})

    class SlowResolver(FakeResolver):
        async def resolve(self, *args, **options):
            await asyncio.sleep(10)

    async with both(timeout_s=0.5, max_redirects=100) as (server, fetcher):
        server.routes["/step"] = slow_step
        server.routes["/drip"] = lambda request: stream(request, [b"x"] * 1000, 0.05)
        server.routes["/silent"] = lambda request: asyncio.sleep(10)
        for path in ("/step", "/drip", "/silent"):
            message = await refused(fetcher, server.url + path, "url_timeout")
            assert message == "the URL was not answered within 0.5 seconds"
    async with fetching(HOST, resolver=SlowResolver(), timeout_s=0.1) as fetcher:
        await refused(fetcher, f"http://{HOST}/", "url_timeout")


@in_loop
async def test_a_caller_that_gives_up_is_no_timeout():
    async with both() as (server, fetcher):
        server.routes["/silent"] = lambda request: asyncio.sleep(10)
        task = asyncio.create_task(fetcher.fetch(f"{server.url}/silent", "image"))
        while not server.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
