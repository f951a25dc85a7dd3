"""Answers as HTTP responses: a model as JSON, which version gave it, and how long each stage took."""

from fastapi.responses import Response
from pydantic import BaseModel


def answer(content: BaseModel, version: str = "", seconds: dict[str, float] | None = None) -> Response:
    """Return a response with the model as JSON, without keys that are not set."""
    return json_response(content.model_dump_json(exclude_none=True), timing_headers(version, seconds or {}))


def json_response(content: str, headers: dict[str, str], status: int = 200) -> Response:
    """Return a response with a JSON text."""
    return Response(content, status, headers, media_type="application/json")


def timing_headers(version: str, seconds: dict[str, float]) -> dict[str, str]:
    """Return the headers that name the version that answered and the seconds of each stage."""
    headers = {"X-Model-Version": version} if version else {}
    if seconds:
        headers["Server-Timing"] = ", ".join(f"{stage};dur={1000 * s:.2f}" for stage, s in seconds.items())
    return headers
