"""The longest request body, held before anything is read, also of one that comes compressed."""

import zlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayclip.serve.images import RequestError
from rayclip.serve.schemas import ErrorResponse

_PIECE = 1 << 20
"""Bytes that are decompressed at a time: a small chunk may become a thousand times as long."""


class BodyTooLongError(Exception):
    """Raised inside the app, where it reads, when a body turns out longer than allowed, or cannot be decompressed."""


class LimitBody:
    """ASGI middleware: a request with a longer body gets a 413, at once where it says its length.

    A body without a length is counted while the app reads it; nothing is buffered here. One in gzip is decompressed on
    the way, and what it becomes is held to the same limit; other encodings get a 415. Put it outside all that turns
    exceptions into answers: what the app answers after its reading was cut off is dropped for the refusal.
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
            self._check_length(_values(scope, b"content-length"))
            is_gzip = _is_gzip(_values(scope, b"content-encoding"))
        except RequestError as error:
            await _answer(error, send)
            return
        body = _GzipBody(receive) if is_gzip else receive
        await _CountedRequest(self.max_bytes, body, send).run(self.app, scope)

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
        self._refusal: RequestError | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            # Whatever the app made of a BodyTooLongError; an answer that has begun can only be broken off.
            if self._refusal is None or self._has_started:
                raise
        if self._refusal is not None and not self._has_started:
            await _answer(self._refusal, self._send)

    async def receive(self) -> Message:
        if self._refusal is not None:
            raise BodyTooLongError
        try:
            message = await self._receive()
        except RequestError as error:
            self._refusal = error
            raise BodyTooLongError from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self.max_bytes:
            self._refusal = _too_long(self.max_bytes)
            raise BodyTooLongError
        return message

    async def send(self, message: Message) -> None:
        if self._refusal is not None and not self._has_started:
            return
        self._has_started = True
        await self._send(message)


class _GzipBody:
    """`receive` that decompresses, a piece at a time: whoever reads may stop before the whole is there."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._decompressor = zlib.decompressobj(wbits=31)
        self._has_more = True
        self._has_ended = False
        self._waiting = b""

    async def __call__(self) -> Message:
        """The next piece. Raises RequestError 400 where the body is no gzip, or ends too early."""
        while True:
            if not self._waiting:
                if not self._has_more:
                    return await self._end()
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._waiting, self._has_more = message.get("body", b""), message.get("more_body", False)
            if piece := self._decompress():
                return {"type": "http.request", "body": piece, "more_body": True}

    def _decompress(self) -> bytes:
        if self._decompressor.eof:  # another member may follow
            self._decompressor = zlib.decompressobj(wbits=31)
        try:
            piece = self._decompressor.decompress(self._waiting, _PIECE)
        except zlib.error:
            raise _bad_gzip("it cannot be decompressed") from None
        self._waiting = self._decompressor.unconsumed_tail or self._decompressor.unused_data
        return piece

    async def _end(self) -> Message:
        if self._has_ended:  # what follows is the client's leaving
            return await self._receive()
        if not self._decompressor.eof:
            if piece := self._decompress():  # what had no room in the last piece
                return {"type": "http.request", "body": piece, "more_body": True}
            raise _bad_gzip("it is cut off")
        self._has_ended = True
        return {"type": "http.request", "body": b"", "more_body": False}


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]


def _is_gzip(values: list[bytes]) -> bool:
    """Whether the body is in gzip. Raises RequestError 415 for another encoding, and for several."""
    encodings = [part.strip().lower() for part in b",".join(values).split(b",")]
    encodings = [encoding for encoding in encodings if encoding not in (b"", b"identity")]
    if encodings and encodings not in ([b"gzip"], [b"x-gzip"]):
        raise RequestError(415, "of Content-Encoding only gzip is read", "unsupported_encoding")
    return bool(encodings)


def _bad_gzip(why: str) -> RequestError:
    return RequestError(400, f"the body is said to be gzip, but {why}", "bad_gzip")


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
    if error.status == 415:
        headers.append((b"accept-encoding", b"gzip"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
