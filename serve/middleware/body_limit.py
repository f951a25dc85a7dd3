"""The longest request body, held before anything is read."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayclip.serve.images import RequestError
from rayclip.serve.schemas import ErrorResponse


class BodyTooLongError(Exception):
    """Raised inside the app, where it reads, when a body turns out longer than allowed."""


class LimitBody:
    """ASGI middleware: a request with a longer body gets a 413, at once where it says its length.

    A body without a length is counted while the app reads it; nothing is buffered here. Put it outside all that turns
    exceptions into answers: what the app answers after its reading was cut off is dropped for the 413.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what is no HTTP request goes through as it is."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_length([value for name, value in scope["headers"] if name.lower() == b"content-length"])
        except RequestError as error:
            await _answer(error, send)
            return
        await _CountedRequest(self.max_bytes, receive, send).run(self.app, scope)

    def _check_length(self, values: list[bytes]) -> None:
        """Raises RequestError 400 or 413."""
        if len(values) > 1 or not all(value.isdigit() for value in values):
            raise RequestError(400, "the Content-Length header must be one whole number", "bad_content_length")
        # Twenty digits are too many in any case, and int() refuses to read thousands of them.
        if any(int(value.lstrip(b"0")[:20] or b"0") > self.max_bytes for value in values):
            raise _too_long(self.max_bytes)


class _CountedRequest:
    """One request whose body is counted as it comes."""

    def __init__(self, max_bytes: int, receive: Receive, send: Send) -> None:
        self.max_bytes = max_bytes
        self._receive = receive
        self._send = send
        self._num_bytes = 0
        self._has_started = False

    @property
    def _is_too_long(self) -> bool:
        return self._num_bytes > self.max_bytes

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            # Whatever the app made of a BodyTooLongError; an answer that has begun can only be broken off.
            if not self._is_too_long or self._has_started:
                raise
        if self._is_too_long and not self._has_started:
            await _answer(_too_long(self.max_bytes), self._send)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
        if self._is_too_long:
            raise BodyTooLongError
        return message

    async def send(self, message: Message) -> None:
        if self._is_too_long and not self._has_started:
            return
        self._has_started = True
        await self._send(message)


def _too_long(max_bytes: int) -> RequestError:
    return RequestError(413, f"the request's body is longer than {max_bytes} bytes", "body_too_large")


async def _answer(error: RequestError, send: Send) -> None:
    body = ErrorResponse(error=error.to_error()).model_dump_json().encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # What was not read is still on its way: the connection cannot be used again.
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
