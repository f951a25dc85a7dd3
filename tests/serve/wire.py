"""Requests and answers as bytes on the wire, and what an answer must be like whatever was asked."""

import contextlib
import http.client
import json
import re
import socket
import urllib.parse
from pathlib import Path
from typing import NamedTuple

JSON = (("Content-Type", "application/json"),)
PNG = (("Content-Type", "image/png"),)
FORM = (("Content-Type", "multipart/form-data; boundary=B"),)
MEGABYTE = 1_000_000
ANY = frozenset({200, 204, 400, 404, 405, 413, 415, 422})
REFUSED = ANY - {200, 204}
NOT_HTTP = frozenset({400, 404, 413, 422, None})
"""What is no HTTP does not come as far as the service: the proxy, or uvicorn, answers or hangs up (None)."""
THEIR_BODIES = (
    b"<html><body><h1>400 Bad request</h1>\nYour browser sent an invalid request.\n</body></html>\n",
    b"<html><body><h1>422 Unprocessable Content</h1>\nThe server cannot process the contained instructions.\n"
    b"</body></html>\n",
    b"Invalid HTTP request received.",
    b"Path '' not found. Ping http://.../-/routes for available routes.",
)
"""All that those two ever say."""

# Tracebacks, files, names of classes, addresses inside: nothing of it is a stranger's business.

# Tracebacks, files, names of classes, addresses inside: nothing of it is a stranger's business.
_INSIDE = re.compile(
    re.escape(str(Path(__file__).parents[2]))
    + r"|Traceback|File \"|site-packages|/home/|/root/|/usr/|/tmp/|\.py\b|\bray::|pydantic|constrained|"
    r"\b[A-Z][a-z]+[A-Za-z]*(Error|Exception|Request|Inputs|Parameters|Item)\b|"
    r"\b(127\.|10\.|192\.168\.|169\.254\.)\d|localhost|\bline \d+, in\b|0x[0-9a-f]{6}"
)


class Case(NamedTuple):
    """One request, what it is, and the statuses that may answer it; None stands for a connection that is closed."""

    name: str
    data: bytes
    allowed: frozenset[int | None] = ANY


class Answer(NamedTuple):
    """What came back; status None where nothing did."""

    status: int | None
    headers: dict[str, str]
    body: bytes


def send(url: str, data: bytes, timeout: float = 60) -> Answer:
    """The answer to bytes on a connection of their own."""
    with connect(url, timeout) as connection:
        with contextlib.suppress(OSError):  # refused while it was on its way: the answer may be there all the same
            connection.sendall(data)
        return receive(connection, data[:5] == b"HEAD ")


def connect(url: str, timeout: float = 60) -> socket.socket:
    """A connection to the service."""
    address = urllib.parse.urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout)


def receive(connection: socket.socket, is_head: bool = False) -> Answer:
    """The next answer on a connection."""
    response = http.client.HTTPResponse(connection, method="HEAD" if is_head else "GET")
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ConnectionError):
        return Answer(None, {}, b"")
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)


def problem(case: Case, answer: Answer) -> str | None:
    """What is wrong with the answer, or None."""
    if answer.status not in case.allowed:
        return f"{case.name}: status {answer.status}, {answer.body[:200]!r}"
    if not answer.status or answer.status < 400 or not answer.body:
        return None
    if case.allowed is NOT_HTTP and answer.body in THEIR_BODIES:
        return None
    reason = wrong_form(answer, case.data)
    return reason and f"{case.name}: {reason}: {answer.body[:300]!r}"


def wrong_form(answer: Answer, sent: bytes = b"") -> str | None:
    """Why an error's answer is not in the service's form, or says too much: more than `sent` had said before."""
    if answer.headers.get("content-type") != "application/json":
        return f"of type {answer.headers.get('content-type')}"
    try:
        content = json.loads(answer.body)
        if set(content) != {"error"} or set(content["error"]) != {"message", "type", "param", "code"}:
            return "not an ErrorResponse"
        said = content["error"]["message"]
    except (ValueError, TypeError):
        return "not an ErrorResponse"
    if not said or "\n" in said or len(said) > 700:
        return "not a line"
    found = [match[0] for match in _INSIDE.finditer(answer.body.decode()) if match[0].encode() not in sent]
    return f"says {found[0]!r}" if found else None


def request(
    method: str, path: str, body: bytes = b"", headers: tuple[tuple[str, str | bytes], ...] = (), version: str = "1.1"
) -> bytes:
    """A request as bytes, with a Content-Length unless the headers have what stands for it."""
    names = {name.lower() for name, _ in headers}
    given = [("Host", "service"), ("Connection", "close"), *headers]
    if not names & {"content-length", "transfer-encoding"} and (body or method in ("POST", "PUT")):
        given.append(("Content-Length", str(len(body))))
    lines = [f"{method} {path} HTTP/{version}".encode("latin-1")]
    lines += [
        name.encode("latin-1") + b": " + (v if isinstance(v, bytes) else v.encode("latin-1")) for name, v in given
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def post(path: str, body: object, headers: tuple[tuple[str, str | bytes], ...] = JSON) -> bytes:
    """A POST; a body that is no bytes goes as JSON."""
    return request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)


def form(*parts: tuple[str, bytes], is_file: bool = False) -> bytes:
    """A body of multipart/form-data whose boundary is B."""
    file = '; filename="x"' if is_file else ""
    heads = [f'--B\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() for name, _ in parts]
    return b"".join(h + value + b"\r\n" for h, (_, value) in zip(heads, parts, strict=True)) + b"--B--\r\n"
