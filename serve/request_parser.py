"""From an HTTP request to pictures and options: JSON, forms with files, or a picture's bytes with a query."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from rayclip.errors import nearest
from rayclip.serve.config import LimitsConfig
from rayclip.serve.fetch import UrlFetcher
from rayclip.serve.images import RequestError, image_payload, is_url
from rayclip.serve.schemas import (
    EmbeddingsRequest,
    HuggingFaceInputs,
    HuggingFaceParameters,
    HuggingFaceRequest,
    LabelSetRequest,
    RankItem,
    RankRequest,
    ZeroShotOptions,
    ZeroShotRequest,
)

Schema = TypeVar("Schema", bound=BaseModel)

_MANY = ("labels", "templates")
_FORM_FIELDS = ("image", "images", *ZeroShotOptions.model_fields)
_SCHEMAS: tuple[type[BaseModel], ...] = (
    ZeroShotRequest,
    HuggingFaceRequest,
    HuggingFaceInputs,
    HuggingFaceParameters,
    EmbeddingsRequest,
    RankRequest,
    RankItem,
    LabelSetRequest,
)
_KEYS = {key for schema in _SCHEMAS for key in schema.model_fields}


@dataclass
class RequestImages:
    """A request's pictures in their order; those that could not be had, by index. `single`: it asked for one answer."""

    data: list[bytes]
    errors: dict[int, RequestError]
    single: bool


class RequestParser:
    """Reads requests within the limits."""

    def __init__(self, limits: LimitsConfig, fetcher: UrlFetcher) -> None:
        self._limits = limits
        self._fetcher = fetcher

    async def zero_shot(self, request: Request) -> tuple[RequestImages, ZeroShotOptions]:
        """The pictures and the options of a zero-shot request of any form. Raises RequestError."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind == "application/json":
            body = parse(ZeroShotRequest, await request.body())
            texts = [body.image] if body.image is not None else body.images or []
            param = "image" if body.image is not None else "images"
            return await self.images(texts, param, single=body.image is not None), body
        if kind == "multipart/form-data":
            return await self._form(request)
        if kind.startswith("image/") or kind == "application/octet-stream":
            data = await request.body()
            options = _options(request.query_params.multi_items())
            return self._given([data], single=True), options
        raise RequestError(415, f"'{kind[:100]}' is neither JSON, a form with files nor a picture", "unsupported_media")

    async def images(
        self, texts: Sequence[str], param: str, single: bool, names: Sequence[str] | None = None
    ) -> RequestImages:
        """The bytes of images given as base64, data: URIs and, where that is switched on, URLs; one fails alone.

        `names` are what errors call them, where that is not their place in `param`.
        """
        self._check_number(len(texts))
        names = names or [param if single else f"{param}[{index}]" for index in range(len(texts))]
        found = await asyncio.gather(*(self._picture(text, name) for text, name in zip(texts, names, strict=True)))
        errors = {index: error for index, error in enumerate(found) if isinstance(error, RequestError)}
        if single and errors:
            raise errors[0]
        return RequestImages([data if isinstance(data, bytes) else b"" for data in found], errors, single)

    async def _picture(self, text: str, param: str) -> bytes | RequestError:
        try:
            if is_url(text):
                return await self._fetcher.fetch(text, param)
            return image_payload(text, param, self._limits.max_body_bytes)
        except RequestError as error:
            return error

    async def _form(self, request: Request) -> tuple[RequestImages, ZeroShotOptions]:
        most = self._limits
        _check_charset(request.headers["content-type"])
        try:
            form = await request.form(
                max_files=most.max_images + 1,
                max_fields=most.max_labels + most.max_templates + 10,
                max_part_size=most.max_body_bytes,
            )
        except (HTTPException, MultiPartException) as error:
            reason = getattr(error, "detail", None) or getattr(error, "message", "")
            raise RequestError(422, f"the form cannot be read: {reason}"[:300], "invalid_form") from None
        try:
            data = await self._files(form)
            options = _options([(k, v) for k, v in form.multi_items() if isinstance(v, str) and not _is_file(k)])
        finally:
            await form.close()  # lets go of temporary files
        return self._given(data, single=len(data) == 1 and "image" in form), options

    async def _files(self, form: FormData) -> list[bytes]:
        data = []
        for key, value in form.multi_items():
            if isinstance(value, UploadFile) and _is_file(key):
                data.append(await value.read())
            elif _is_file(key):
                data.append(image_payload(str(value), key, self._limits.max_body_bytes))
            elif isinstance(value, UploadFile):
                message = f"'{key[:100]}' is a file; pictures go under image or images"
                raise RequestError(422, message, "invalid_form")
        return data

    def _given(self, data: list[bytes], single: bool) -> RequestImages:
        self._check_number(len(data))
        return RequestImages(data, {}, single)

    def _check_number(self, number: int) -> None:
        if not number:
            raise RequestError(422, "the request holds no picture", "no_picture", "image")
        if number > self._limits.max_images:
            message = f"{number} pictures; at most {self._limits.max_images} are allowed"
            raise RequestError(422, message, "too_many", "images")


def parse(schema: type[Schema], body: bytes) -> Schema:
    """A JSON body. Raises RequestError that names the first wrong key."""
    try:
        return schema.model_validate_json(body or b"null")
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False), list(schema.model_fields)) from None


def invalid(errors: Sequence[Any], keys: Sequence[str] = ()) -> RequestError:
    """The most telling of pydantic's errors as a line; `keys` are those that the body may have."""
    # Of a value that may be of several types there is an error for each: the one that got furthest tells most.
    same = [error for error in errors if _known(error["loc"])[:1] == _known(errors[0]["loc"])[:1]]
    error = max(same, key=lambda error: len(_known(error["loc"])))
    unknown = error["type"] == "extra_forbidden"
    known = _known(error["loc"])
    parts = [*known, error["loc"][-1]] if unknown and error["loc"][-1] not in known[-1:] else known
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")[:200]
    if error["type"] == "json_invalid":
        return RequestError(422, f"the body is not JSON: {error['ctx']['error']}"[:200], "invalid_request")
    what = error["msg"].removeprefix("Value error, ")[:200]
    if unknown:
        hint = f": {nearest(where, list(keys))}" if keys and len(error["loc"]) == 1 else ""
        return RequestError(422, f"unknown key '{where}'{hint}", "invalid_request", where)
    return RequestError(422, f"{where}: {what}" if where else what, "invalid_request", where or None)


def _known(loc: Sequence[Any]) -> list[Any]:
    """The keys and indices of a place: pydantic puts names of types between them, which are nobody's business."""
    return [part for part in loc if isinstance(part, int) or part in _KEYS]


def _options(items: Sequence[tuple[str, Any]]) -> ZeroShotOptions:
    """Options from a form's fields or a query: lists as repeated fields, or as one field that holds a JSON list."""
    values: dict[str, Any] = {}
    for key, value in items:
        if key not in _FORM_FIELDS:
            message = f"unknown field '{key[:100]}': {nearest(key[:100], list(_FORM_FIELDS))}"
            raise RequestError(422, message, "invalid_form")
        if key in _MANY:
            values.setdefault(key, []).extend(_list(value))
        else:
            values[key] = value
    if len(values.get("templates", ())) == 1:  # a set's name, or the one template
        values["templates"] = values["templates"][0]
    try:
        # Not strict: a form's numbers are text.
        return ZeroShotOptions.model_validate(values, strict=False)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from None


def _list(value: str) -> list[Any]:
    if not value.lstrip().startswith("["):
        return [value]
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):  # the second for a hundred thousand brackets
        return [value]
    return found if isinstance(found, list) else [value]


def _is_file(key: str) -> bool:
    return key in ("image", "images")


def _check_charset(content_type: str) -> None:
    """Raise RequestError unless a form is in UTF-8.

    Python's other encodings are not for strangers to choose among: one takes minutes for a megabyte, some raise what
    nobody expects, and some give half characters, which no answer can hold.
    """
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii"):
        raise RequestError(415, "a form must be in UTF-8", "unsupported_media")
