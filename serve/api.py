"""The application of an ingress replica: its routes, what stands before them, and how mistakes are answered."""

import importlib.util
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from rayclip.inference.prompts import TEMPLATES
from rayclip.serve.fetch import UrlFetcher
from rayclip.serve.images import RequestError
from rayclip.serve.middleware.auth import KeyRing
from rayclip.serve.middleware.body_limit import LimitBody
from rayclip.serve.middleware.head import HeadAsGet
from rayclip.serve.middleware.request_guard import RequestGuard, error_headers
from rayclip.serve.request_parser import RequestParser, invalid
from rayclip.serve.responses import answer, json_response
from rayclip.serve.routes import add_answer_routes
from rayclip.serve.schemas import (
    ErrorResponse,
    LabelSetInfo,
    LabelSetRequest,
    LabelSetsResponse,
    ModelsResponse,
    ServedModel,
    TemplatesResponse,
)
from rayclip.serve.service import Service

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
# Swagger UI sets styles on its elements, and draws its icons from data: URIs.
_DOCS_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_OWN_FILES = ("app.js", "style.css", "docs.js")
_SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
_EXPOSED_HEADERS = ["X-Model-Version", "X-Warning", "Server-Timing", "Retry-After", "WWW-Authenticate"]
"""What a page of another origin may read of an answer beside its body."""
_MAX_NAME = 200
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": what}
    for status, what in {
        400: "the body cannot be read",
        401: "no valid API key, where one is required",
        404: "no such model or label set",
        408: "the body did not come in time",
        413: "the body is too large",
        415: "the body is of a kind that is not read",
        422: "the request is invalid",
        429: "too much at once: Retry-After says when",
        503: "no answer from the model",
        504: "no answer in time",
    }.items()
}


def build_api(service: Service, keys: KeyRing | None) -> FastAPI:
    """The application of an ingress replica. `keys` is None where requests need none."""
    config = service.config
    fetcher = UrlFetcher(config.urls)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await fetcher.close()

    api = FastAPI(
        title="rayclip",
        summary="Zero-shot classification, embeddings and ranking",
        responses=_ERRORS,
        lifespan=lifespan,
        # The redirect would lead to whatever host the request names, and the specification does not know it.
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    # What is added last stands outermost: a browser's preflight has no key, a body is measured before it is read.
    api.add_middleware(LimitBody, max_bytes=config.limits.max_body_bytes)
    api.add_middleware(
        RequestGuard,
        keys=keys,
        max_running=config.max_waiting,
        timeout_s=config.request_timeout_s,
        metrics=service.metrics,
        phase=lambda: service.phase,
    )
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    api.add_middleware(HeadAsGet)
    _add_errors(api)
    add_answer_routes(api, service, RequestParser(config.limits, fetcher))
    _add_label_sets(api, service)
    _add_operations(api, service)
    _add_page(api)
    return api


def _add_label_sets(api: FastAPI, service: Service) -> None:
    @api.get("/v1/label-sets", response_model=LabelSetsResponse)
    async def label_sets() -> Response:
        """The registered label sets."""
        return answer(LabelSetsResponse(data=list((await service.label_sets()).values())))

    @api.get("/v1/label-sets/{name}", response_model=LabelSetInfo)
    async def label_set(name: str) -> Response:
        """One label set."""
        return answer(await service.label_set(name))

    @api.put("/v1/label-sets/{name}", response_model=LabelSetInfo)
    async def put_label_set(name: str, body: LabelSetRequest) -> Response:
        """Register labels under a name, or replace them; requests then say `label_set`."""
        _check_name(name)
        service.labels_of(body.labels, service.templates_of(body.templates))
        label_set = LabelSetInfo(name=name, labels=body.labels, templates=body.templates)
        await service.put_label_set(label_set)
        return answer(label_set)

    @api.delete("/v1/label-sets/{name}", status_code=204)
    async def delete_label_set(name: str) -> Response:
        """Forget a label set."""
        await service.delete_label_set(name)
        return Response(status_code=204)


def _add_operations(api: FastAPI, service: Service) -> None:
    probe = _probe_image()

    @api.get("/v1/models", response_model=ModelsResponse)
    async def models() -> Response:
        """The versions that are loaded, or being loaded, or that failed, and their shares of the traffic."""
        return answer(await service.models())

    @api.get("/v1/models/{model:path}", response_model=ServedModel)
    async def model(model: str) -> Response:
        """One version by its id; by a model's name the one that has most of its traffic."""
        return answer(await service.model(model))

    @api.get("/v1/templates", response_model=TemplatesResponse)
    async def templates() -> Response:
        """The named template sets, and what is used where a request says nothing."""
        sets = {name: list(each) for name, each in TEMPLATES.items()}
        return answer(TemplatesResponse(default=list(service.templates_of(None)), data=sets))

    @api.get("/livez", response_class=PlainTextResponse)
    async def livez() -> Response:
        """200 as long as this process answers: one that does not is to be started anew."""
        return Response("ok\n", media_type="text/plain")

    @api.get("/health", response_class=PlainTextResponse)
    @api.get("/readyz", response_class=PlainTextResponse)
    @api.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> Response:
        """200 where both towers have just answered; 503 where not, while models are loaded, and before the end."""
        try:
            await service.check(probe)
        except RequestError as error:
            if error.code in ("loading", "stopping"):
                raise
            if error.status != 429:  # busy is not ill
                raise RequestError(503, "the model does not answer", "unhealthy") from None
        except Exception:
            raise RequestError(503, "the model does not answer", "unhealthy") from None
        return Response("ok\n", media_type="text/plain")

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The whole service's figures, in Prometheus' text form."""
        return Response(await service.prometheus(), media_type="text/plain; version=0.0.4")


def _add_page(api: FastAPI) -> None:
    # Found and not imported: of the package only the files are of use here.
    package = importlib.util.find_spec("fastapi_offline")
    swagger = Path(package.origin).parent / "static" if package and package.origin else None

    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_PAGE / "docs.html", headers=_DOCS_HEADERS)

    @api.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> FileResponse:
        folder = _PAGE if name in _OWN_FILES else swagger if name in _SWAGGER_FILES else None
        if folder is None:
            raise RequestError(404, "not found", "not_found")
        return FileResponse(folder / name, headers=_PAGE_HEADERS)


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        content = ErrorResponse(error=error.to_error()).model_dump_json()
        return json_response(content, error_headers(error), error.status)

    @api.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, invalid(error.errors()))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = await refused(request, RequestError(error.status_code, str(error.detail), "http_error"))
        response.headers.update(error.headers or {})
        return response


def _check_name(name: str) -> None:
    """Raise RequestError for a label set's name that cannot be a file's, in which the set may be kept."""
    if len(quote(name, safe="")) > _MAX_NAME:
        message = f"the name is too long: at most {_MAX_NAME} bytes, of which others than letters and digits count as 3"
        raise RequestError(422, message, "text_too_long", "name")


def _probe_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "grey").save(file, "PNG")
    return file.getvalue()
