"""The longest body: refused by its declared length, or cut off where it becomes too long, and never kept."""

import asyncio
import json

import httpx2
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from rayclip.serve.middleware.body_limit import BodyTooLongError, LimitBody

TOO_LONG = {
    "error": {
        "message": "the request's body is longer than 10 bytes",
        "type": "invalid_request_error",
        "param": None,
        "code": "body_too_large",
    }
}


class Exchange:
    """One request, given as the chunks of its body, and what was sent back."""

    def __init__(self, chunks=(), headers=(), kind="http"):
        self.messages = [
            {"type": "http.request", "body": body, "more_body": i + 1 < len(chunks)} for i, body in enumerate(chunks)
        ]
        self.num_read = 0
        self.sent = []
        self.scope = {"type": kind, "method": "POST", "path": "/", "headers": list(headers)}

    def run(self, app):
        asyncio.run(LimitBody(app, 10)(self.scope, self.receive, self.send))
        return self

    async def receive(self):
        if self.num_read == len(self.messages):
            return {"type": "http.disconnect"}
        self.num_read += 1
        return self.messages[self.num_read - 1]

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        assert [message["type"] for message in self.sent] == ["http.response.start", "http.response.body"]
        return self.sent[0]["status"]

    @property
    def body(self):
        headers = dict(self.sent[0]["headers"])
        assert headers[b"content-type"] == b"application/json"
        assert int(headers[b"content-length"]) == len(self.sent[1]["body"])
        assert headers[b"connection"] == b"close"
        return json.loads(self.sent[1]["body"])


async def read_all(receive):
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def answer(send, status, body):
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def echo(scope, receive, send):
    await answer(send, 200, await read_all(receive))


async def never(scope, receive, send):
    pytest.fail("the app was called")


def length(*values):
    return [(b"content-length", value) for value in values]


# Declared lengths


@pytest.mark.parametrize("declared", [b"11", b"00011", b"9" * 19, b"9" * 5000])
def test_a_body_declared_too_long_is_refused_unread(declared):
    exchange = Exchange([b"x" * 11], length(declared)).run(never)
    assert (exchange.status, exchange.body) == (413, TOO_LONG)
    assert exchange.num_read == 0


@pytest.mark.parametrize("declared", [b"10", b"0010", b"0" * 5000 + b"10"])
def test_a_body_of_the_longest_length_passes(declared):
    exchange = Exchange([b"x" * 10], length(declared)).run(echo)
    assert exchange.status == 200
    assert exchange.sent[1]["body"] == b"x" * 10


@pytest.mark.parametrize("declared", [b"", b"-1", b"+5", b"5.0", b"0x5", b"1_0", b"5, 5", b" 5", b"five", b"\xb2"])
def test_a_malformed_length_is_a_bad_request(declared):
    exchange = Exchange([b"x"], length(declared)).run(never)
    assert exchange.status == 400
    assert exchange.body["error"] == {
        "message": "the Content-Length header must be one whole number",
        "type": "invalid_request_error",
        "param": None,
        "code": "bad_content_length",
    }
    assert exchange.num_read == 0


def test_two_lengths_are_a_bad_request():
    assert Exchange([b"x"], length(b"1", b"2")).run(never).status == 400
    assert Exchange([b"x"], [(b"Content-Length", b"1"), (b"content-length", b"11")]).run(never).status == 400


# Lengths that turn out


@pytest.mark.parametrize("headers", [[], [(b"transfer-encoding", b"chunked")], length(b"3")])
def test_a_body_that_becomes_too_long_is_cut_off(headers):
    exchange = Exchange([b"x" * 6, b"x" * 4, b"x", b"x" * 1000], headers).run(echo)
    assert (exchange.status, exchange.body) == (413, TOO_LONG)
    assert exchange.num_read == 3


def test_a_streamed_body_of_the_longest_length_passes():
    exchange = Exchange([b"x" * 6, b"x" * 4, b""]).run(echo)
    assert exchange.status == 200
    assert exchange.sent[1]["body"] == b"x" * 10


def test_chunks_reach_the_app_one_by_one():
    seen = []

    async def app(scope, receive, send):
        for i in range(3):
            seen.append((await receive())["body"])
            assert exchange.num_read == i + 1
        await answer(send, 200, b"")

    exchange = Exchange([b"ab", b"cd", b"ef"])
    assert exchange.run(app).status == 200
    assert seen == [b"ab", b"cd", b"ef"]


@pytest.mark.parametrize("status", [200, 400, 500])
def test_what_an_app_answers_to_its_broken_reading_is_dropped(status):
    async def app(scope, receive, send):
        try:
            await read_all(receive)
        except Exception:
            await answer(send, status, b"made up")

    exchange = Exchange([b"x" * 11]).run(app)
    assert (exchange.status, exchange.body) == (413, TOO_LONG)


def test_an_app_that_raises_something_else_instead_is_a_413_too():
    async def app(scope, receive, send):
        try:
            await read_all(receive)
        except BodyTooLongError as error:
            raise RuntimeError("unreadable") from error

    assert Exchange([b"x" * 11]).run(app).status == 413


def test_an_app_cannot_go_on_reading():
    async def app(scope, receive, send):
        for _ in range(3):
            with pytest.raises(BodyTooLongError):
                await receive()

    assert Exchange([b"x" * 11, b"y", b"z"]).run(app).status == 413


def test_an_answer_that_has_begun_is_broken_off():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await read_all(receive)

    exchange = Exchange([b"x" * 11])
    with pytest.raises(BodyTooLongError):
        exchange.run(app)
    assert len(exchange.sent) == 1


def test_an_app_that_answers_without_reading_is_left_alone():
    async def app(scope, receive, send):
        await answer(send, 401, b"no")

    exchange = Exchange([b"x" * 1000]).run(app)
    assert exchange.status == 401
    assert exchange.num_read == 0


def test_an_apps_own_error_stays_its_own():
    async def app(scope, receive, send):
        await read_all(receive)
        raise KeyError("defect")

    with pytest.raises(KeyError, match="defect"):
        Exchange([b"x"]).run(app)


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_what_is_no_request_goes_through(kind):
    calls = []

    async def app(scope, receive, send):
        calls.append((scope["type"], (await receive())["type"]))

    Exchange([], length(b"1000"), kind).run(app)
    assert calls == [(kind, "http.disconnect")]


# Inside a FastAPI application, which makes a 400 of whatever its reading of a body raises


def fastapi_app():
    api = FastAPI()
    api.add_middleware(LimitBody, max_bytes=10)

    @api.post("/json")
    async def take_json(body: dict):
        return body

    @api.post("/raw")
    async def take_raw(request: Request):
        return JSONResponse({"length": len(await request.body())})

    @api.post("/form")
    async def take_form(request: Request):
        async with request.form() as form:
            return JSONResponse({"fields": len(form)})

    return api


FORM = b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n'


async def in_pieces(content):
    for i in range(0, len(content), 4):
        yield content[i : i + 4]


def posted(path, **options):
    async def run():
        transport = httpx2.ASGITransport(app=fastapi_app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, **options)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "kind", "content"),
    [
        ("/json", "application/json", b'{"a": 123456}'),
        ("/raw", "image/png", b"x" * 11),
        ("/form", "multipart/form-data; boundary=b", FORM),
        ("/form", "application/x-www-form-urlencoded", b"a=123456789"),
    ],
)
def test_fastapi_answers_413_however_it_reads(path, kind, content):
    for body in (content, in_pieces(content)):
        response = posted(path, content=body, headers={"content-type": kind})
        assert (response.status_code, response.json()) == (413, TOO_LONG)


def test_fastapi_answers_bodies_that_fit():
    assert posted("/json", content=b'{"a": 123}', headers={"content-type": "application/json"}).json() == {"a": 123}
    assert posted("/raw", content=in_pieces(b"x" * 10)).json() == {"length": 10}
