"""What stands before Ray's own code in the processes that answer HTTP; Ray is told of it by launch.set_environment."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from rayclip.orchestration.cluster.ray_internals import OBEYED_HEADERS, READ_HEADERS

_MAX_READ = 200


class StripRayHeaders:
    """ASGI middleware that lets no header through that Ray obeys, and of those that it reads only plain short ones.

    With the first a stranger could switch off the end of a request whose client has left, or have it end with Ray's
    words. The others Ray decodes as UTF-8 outside of everything that makes answers out of errors: one byte that is none
    was a 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] in ("http", "websocket"):
            scope["headers"] = [header for header in scope["headers"] if _may_pass(*header)]
        await self._app(scope, receive, send)


def _may_pass(name: bytes, value: bytes) -> bool:
    key = name.decode("latin-1").lower().replace("-", "_")
    if key in READ_HEADERS:
        return value.isascii() and len(value) <= _MAX_READ
    return key not in OBEYED_HEADERS


def middlewares() -> list[Middleware]:
    """What Ray is to put before its own."""
    return [Middleware(StripRayHeaders)]
