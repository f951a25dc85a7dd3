"""What every request passes before its route: who asks, is there room, how long may it take; and what is counted."""

import asyncio
import json
import logging
import time
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayclip.serve.images import RequestError
from rayclip.serve.metrics import IngressMetrics
from rayclip.serve.middleware.auth import KeyRing
from rayclip.serve.versions.routing_table import Phase

_logger = logging.getLogger("ray.serve")

PROBES = ("/healthz", "/health", "/readyz", "/livez")
"""What balancers and kubelets ask; they have no key, and an answer must not depend on how much there is to do."""
_OPEN_PATHS = ("/", "/docs", "/openapi.json")
"""What needs no key to be looked at: the page asks for one itself."""
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class RequestGuard:
    """ASGI middleware; answers 401, 408, 429, 503 and 504 by itself, and 500 with no word of what went wrong inside."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        max_running: int,
        timeout_s: float,
        metrics: IngressMetrics,
        phase: Callable[[], Phase] = lambda: "serving",
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_running = max_running
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._phase = phase

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        answer = _Answer(send)
        is_probe = _path(scope) in PROBES
        self._count(0 if is_probe else 1)
        try:
            await self._pass(scope, receive, answer)
        finally:
            self._count(0 if is_probe else -1)
            # The route's pattern and not its path: a label set's name must not become a time series.
            route = getattr(scope.get("route"), "path", "other")
            # 499, as nginx has it: the client left before there was an answer.
            self._metrics.requests.labels(route, str(answer.status or 499), answer.model).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _count(self, change: int) -> None:
        self._metrics.num_running += change
        self._metrics.running.set(self._metrics.num_running)

    async def _pass(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        body = _Body(receive)
        try:
            self._check(scope)
            async with asyncio.timeout(self._timeout_s):
                await self._app(scope, body, answer)
        except RequestError as error:
            await answer.refuse(error)
        except TimeoutError:
            if body.is_awaited:  # the client's fault and not ours
                late = RequestError(408, f"the body did not come within {self._timeout_s:g} s", "body_timeout")
            else:
                late = RequestError(504, f"no answer within {self._timeout_s:g} s", "timeout")
            await answer.refuse(late)
        except ClientDisconnect:
            return  # nobody is there to be answered, and nothing went wrong
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not this request was cancelled, but work of another one that it waited for.
            await answer.refuse(RequestError(503, "the work for this answer was cut off: try again", "interrupted"))
        except Exception:
            _logger.exception("a request failed: %s %s", scope["method"], scope["path"])
            await answer.refuse(RequestError(500, "the service failed to answer; its log says why", "internal_error"))

    def _check(self, scope: Scope) -> None:
        path = _path(scope)
        if path in PROBES:
            return
        is_open = scope["method"] == "GET" and (path in _OPEN_PATHS or path.startswith("/page/"))
        if self._keys is not None and self._keys.required and not is_open:
            headers = dict(scope["headers"])
            given = headers.get(b"authorization"), headers.get(b"x-api-key")
            name = self._keys.name_of(*(value.decode("latin-1") if value is not None else None for value in given))
            if name is None:
                raise RequestError(401, "give an API key: Authorization: Bearer KEY", "invalid_api_key")
        if self._phase() == "closed":
            raise RequestError(503, "the service is stopping: ask another one, or again later", "stopping")
        if self._metrics.num_running > self._max_running:
            raise RequestError(429, "the service is busy: try again in a second", "overloaded")


class _Body:
    """`receive` that knows whether the app is waiting for more of the body."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_whole = False
        self.is_awaited = False

    async def __call__(self) -> Message:
        self.is_awaited = not self._is_whole  # stays so where the wait is cut off
        message = await self._receive()
        self._is_whole = not message.get("more_body", False)
        self.is_awaited = False
        return message


class _Answer:
    """`send` that remembers the status and adds the headers that every answer has."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.model = ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            self.model = _header(headers, b"x-model-version")
            message["headers"] = [*headers, *_HEADERS]
        await self._send(message)

    async def refuse(self, error: RequestError) -> None:
        """Answer with the error, unless an answer has begun."""
        if self.status:
            return
        body = json.dumps({"error": error.to_error().model_dump()}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def _path(scope: Scope) -> str:
    """The path below the prefix that the application is mounted at."""
    return scope["path"].removeprefix(scope.get("root_path", "")) or "/"


def error_headers(error: RequestError) -> dict[str, str]:
    """What the status asks for beside the body."""
    headers = {
        401: {"WWW-Authenticate": "Bearer"},
        408: {"Connection": "close"},  # the rest of the body may still come
        429: {"Retry-After": "1"},
        503: {"Retry-After": "1"},
    }
    return headers.get(error.status, {})


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode() for key, value in headers if key == name), "")
