"""What the gate makes of requests that end in another way than with an answer of the app."""

import asyncio
import json

import pytest
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect

from rayclip.serve.images import RequestError
from rayclip.serve.metrics import IngressMetrics
from rayclip.serve.middleware.request_guard import RequestGuard
from rayclip.serve.middleware.strip_ray_headers import StripRayHeaders


class Exchange:
    """One request through a gate, of whose body `messages` come, and what was answered."""

    def __init__(self, app, messages=(), timeout_s=5.0):
        self.metrics = IngressMetrics()
        self._messages = list(messages)
        self._sent = []
        self._gate = RequestGuard(app, None, max_running=1, timeout_s=timeout_s, metrics=self.metrics)

    async def pass_through(self):
        scope = {"type": "http", "method": "POST", "path": "/v1/rank", "headers": []}
        await self._gate(scope, self.receive, self.send)

    def run(self):
        asyncio.run(self.pass_through())
        return self

    async def receive(self):
        if not self._messages:
            await asyncio.sleep(60)
        return self._messages.pop(0)

    async def send(self, message):
        self._sent.append(message)

    @property
    def error(self):
        start, body = self._sent
        return start["status"], json.loads(body["body"])["error"]["code"], dict(start["headers"])

    @property
    def counted(self):
        lines = generate_latest(self.metrics.registry).decode().splitlines()
        return [line.split('status="')[1][:3] for line in lines if line.startswith("rayclip_requests_total")]


def body(content=b"", more=False):
    return {"type": "http.request", "body": content, "more_body": more}


async def read(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("messages", "status", "code"),
    [
        ([], 408, "body_timeout"),
        ([body(b"a", more=True)], 408, "body_timeout"),
        ([body(b"a", more=True), body(b"b")], 504, "timeout"),
        ([body()], 504, "timeout"),
    ],
)
def test_a_body_that_comes_late_is_the_clients_fault(messages, status, code):
    exchange = Exchange(read, messages, timeout_s=0.05).run()
    assert exchange.error[:2] == (status, code)
    assert exchange.counted == [str(status)]
    assert (exchange.error[2].get(b"Connection") == b"close") == (status == 408)


def test_a_wait_for_the_clients_end_is_no_wait_for_the_body():
    async def app(scope, receive, send):
        await receive()
        await receive()  # nothing comes but, one day, that the client has left

    assert Exchange(app, [body()], timeout_s=0.05).run().error[0] == 504


def test_a_client_that_leaves_is_no_failure(caplog):
    async def app(scope, receive, send):
        raise ClientDisconnect

    exchange = Exchange(app).run()
    assert exchange.counted == ["499"]
    assert not caplog.records


def test_a_request_that_is_cancelled_is_counted_and_stays_cancelled():
    exchange = Exchange(read)

    async def cancel():
        task = asyncio.create_task(exchange.pass_through())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert exchange.counted == ["499"]


def test_work_of_others_that_was_cancelled_is_answered():
    async def app(scope, receive, send):
        work = asyncio.create_task(asyncio.sleep(60))
        work.cancel()
        await asyncio.shield(work)

    assert Exchange(app).run().error[:2] == (503, "interrupted")


def test_errors_are_answered_without_a_word_of_what_went_wrong(caplog):
    async def app(scope, receive, send):
        raise ValueError("/secret/path")

    exchange = Exchange(app).run()
    assert exchange.error[:2] == (500, "internal_error")
    assert "/secret/path" not in str(exchange._sent)


def test_more_than_may_run_are_refused():
    async def app(scope, receive, send):
        await asyncio.sleep(0.05)
        raise RequestError(422, "no", "no")

    async def two():
        other = asyncio.create_task(exchange.pass_through())
        await asyncio.sleep(0.01)
        await exchange.pass_through()
        assert exchange.error[0] == 429
        assert exchange.error[2][b"Retry-After"] == b"1"
        await other

    exchange = Exchange(app)
    asyncio.run(two())


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        (b"content-type", b"\xff", True),
        (b"authorization", b"\xff", True),
        (b"x-request-id", b"a-1", True),
        (b"x-request-id", b"\xff", False),
        (b"x-request-id", b"a" * 201, False),
        (b"traceparent", b"00-ab", True),
        (b"tracestate", b"\xff", False),
        (b"x-request-timeout-seconds", b"1", False),
        (b"x-request-disconnect-disabled", b"?1", False),
        (b"Serve-Multiplexed-Model-Id", b"a", False),
        (b"serve_multiplexed_model_id", b"a", False),
        (b"x-session-id", b"a", False),
    ],
)
def test_headers_that_ray_would_obey_are_dropped(name, value, passes):
    seen = []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])

    asyncio.run(StripRayHeaders(app)({"type": "http", "headers": [(b"host", b"a"), (name, value)]}, None, None))
    assert seen == [(b"host", b"a"), (name, value)][: 2 if passes else 1]
