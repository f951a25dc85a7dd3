"""The routes: each reads a request, asks the service, and forms the answer."""

import base64
import io
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from rayclip.inference.prompts import TEMPLATES
from serve.auth import ApiKeys
from serve.fetch import UrlFetcher
from serve.gate import Gate, error_headers
from serve.intake import Intake, Pictures, invalid
from serve.limits import LimitBody
from serve.pictures import RequestError
from serve.schemas import (
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ErrorResponse,
    HuggingFaceRequest,
    LabelScore,
    LabelSetInfo,
    LabelSetRequest,
    LabelSetsResponse,
    ModelsResponse,
    PictureResult,
    Prediction,
    Ranked,
    RankItem,
    RankRequest,
    RankResponse,
    TemplatesResponse,
    Usage,
    ZeroShotOptions,
    ZeroShotRequest,
    ZeroShotResponse,
)
from serve.service import Scored, Service

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
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


def build_api(service: Service, keys: ApiKeys | None) -> FastAPI:
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
    )
    # What is added last stands outermost: a browser's preflight has no key, a body is measured before it is read.
    api.add_middleware(LimitBody, max_bytes=config.limits.max_body_bytes)
    api.add_middleware(
        Gate, keys=keys, max_running=config.max_waiting, timeout_s=config.request_timeout_s, metrics=service.metrics
    )
    if config.cors_origins:
        api.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    _add_errors(api)
    _add_answers(api, service, Intake(config.limits, fetcher))
    _add_label_sets(api, service)
    _add_operations(api, service)
    _add_page(api)
    return api


def _add_answers(api: FastAPI, service: Service, intake: Intake) -> None:
    @api.post("/v1/zero-shot", openapi_extra=_zero_shot_bodies(), response_model=ZeroShotResponse)
    async def zero_shot(request: Request) -> Response:
        """Classify pictures into labels that the request names.

        JSON, a form with files under `image` or `images`, or a picture's bytes with the options in the query. Of
        several pictures, one that cannot be read has its error in place of predictions; a single one is a 422.
        """
        pictures, options = await intake.zero_shot(request)
        labels, templates = await _labels_and_templates(service, options)
        scored = await _score(service, pictures, labels, templates, options)
        results = [
            PictureResult(index=i, error=scored.errors[i].to_error())
            if i in scored.errors
            else PictureResult(index=i, predictions=_best(row, labels, options.top_k))
            for i, row in enumerate(scored.scores)
        ]
        answer = ZeroShotResponse(model=scored.version, templates=list(templates), scores=options.kind, results=results)
        return _answer(answer, scored.version, scored.seconds)

    @api.post("/v1/zero-shot-image-classification", response_model=list[LabelScore])
    async def hugging_face(body: HuggingFaceRequest) -> Response:
        """The Hugging Face task of that name: a flat list, best label first."""
        asked = body.parameters
        template = asked.hypothesis_template
        options = ZeroShotOptions(labels=asked.candidate_labels, templates=None if template is None else [template])
        picture = body.inputs if isinstance(body.inputs, str) else body.inputs.image
        pictures = await intake.pictures([picture], "inputs", single=True)
        labels, templates = await _labels_and_templates(service, options)
        scored = await _score(service, pictures, labels, templates, options)
        best = [LabelScore(label=p.label, score=p.score) for p in _best(scored.scores[0], labels, None)]
        content = "[" + ",".join(each.model_dump_json() for each in best) + "]"
        return _json(content, _headers(scored.version, scored.seconds))

    @api.post("/v1/embeddings", response_model=EmbeddingsResponse)
    async def embeddings(body: EmbeddingsRequest) -> Response:
        """Features of texts and pictures, of length 1, in OpenAI's form."""
        items = [body.input] if isinstance(body.input, str) else body.input
        features, version, tokens = await _embed(service, intake, items, _modalities(body, items), body)
        if body.dimensions not in (None, features.shape[1]):
            message = f"dimensions must be {features.shape[1]}: a CLIP's features do not nest"
            raise RequestError(422, message, "invalid_dimensions", "dimensions")
        data = [Embedding(index=i, embedding=_numbers(row, body.encoding_format)) for i, row in enumerate(features)]
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        return _answer(EmbeddingsResponse(data=data, model=version, usage=usage), version, {})

    @api.post("/v1/rank", response_model=RankResponse)
    async def rank(body: RankRequest) -> Response:
        """Candidates by their similarity to the query, best first; both may be texts or pictures."""
        items = [_rank_item(item) for item in [body.query, *body.candidates]]
        values = [item.text or item.image or "" for item in items]
        kinds = ["text" if item.text is not None else "image" for item in items]
        features, version, _ = await _embed(service, intake, values, kinds, body)
        cosines = features[1:] @ features[0]
        scale = next((m.logit_scale for m in await service.models() if m.id == version), None) or 1.0
        probabilities = torch.from_numpy(scale * cosines).softmax(dim=0).numpy()
        order = np.argsort(-cosines, kind="stable")[: body.top_k]
        ranked = [Ranked(index=i, score=float(cosines[i]), probability=float(probabilities[i])) for i in order]
        return _answer(RankResponse(model=version, results=ranked), version, {})


def _add_label_sets(api: FastAPI, service: Service) -> None:
    @api.get("/v1/label-sets", response_model=LabelSetsResponse)
    async def label_sets() -> Response:
        """The registered label sets."""
        return _answer(LabelSetsResponse(data=list((await service.label_sets()).values())))

    @api.get("/v1/label-sets/{name}", response_model=LabelSetInfo)
    async def label_set(name: str) -> Response:
        """One label set."""
        return _answer(await service.label_set(name))

    @api.put("/v1/label-sets/{name}", response_model=LabelSetInfo)
    async def put_label_set(name: str, body: LabelSetRequest) -> Response:
        """Register labels under a name, or replace them; requests then say `label_set`."""
        _check_name(name)
        _labels_in(service, body.labels, service.templates_of(body.templates))
        label_set = LabelSetInfo(name=name, labels=body.labels, templates=body.templates)
        await service.put_label_set(label_set)
        return _answer(label_set)

    @api.delete("/v1/label-sets/{name}", status_code=204)
    async def delete_label_set(name: str) -> Response:
        """Forget a label set."""
        await service.delete_label_set(name)
        return Response(status_code=204)


def _add_operations(api: FastAPI, service: Service) -> None:
    probe = _probe_picture()

    @api.get("/v1/models", response_model=ModelsResponse)
    async def models() -> Response:
        """The versions that are loaded, or being loaded, and their shares of the traffic."""
        return _answer(ModelsResponse(data=await service.models()))

    @api.get("/v1/templates", response_model=TemplatesResponse)
    async def templates() -> Response:
        """The named template sets, and what is used where a request says nothing."""
        sets = {name: list(each) for name, each in TEMPLATES.items()}
        return _answer(TemplatesResponse(default=list(service.templates_of(None)), data=sets))

    @api.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> Response:
        """200 where both towers have just answered, 503 where they have not."""
        try:
            await service.check(probe)
        except RequestError as error:
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
    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)

    @api.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> FileResponse:
        if name not in ("app.js", "style.css"):
            raise RequestError(404, "not found", "not_found")
        return FileResponse(_PAGE / name, headers=_PAGE_HEADERS)


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        content = ErrorResponse(error=error.to_error()).model_dump_json()
        return _json(content, error_headers(error), error.status)

    @api.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, invalid(error.errors()))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = await refused(request, RequestError(error.status_code, str(error.detail), "http_error"))
        response.headers.update(error.headers or {})
        return response


async def _labels_and_templates(service: Service, options: ZeroShotOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    labels, templates = options.labels, options.templates
    if options.label_set is not None:
        known = await service.label_set(options.label_set)
        labels, templates = known.labels, known.templates if templates is None else templates
    resolved = service.templates_of(templates)
    return _labels_in(service, labels or [], resolved), resolved


def _labels_in(service: Service, labels: Sequence[str], templates: tuple[str, ...]) -> tuple[str, ...]:
    """The labels, once they and what the templates make of them are within the limits. Raises RequestError."""
    found = service.labels_of(labels, templates)
    # A template may name its place a thousand times: 2,000 long labels in one such template were four gigabytes.
    limit = 2 * service.config.limits.max_text_chars
    longest = max(len(label) for label in found)
    if any(len(template) + template.count("{}") * longest > limit for template in templates):
        message = f"a template and a label together are longer than {limit} characters"
        raise RequestError(422, message, "text_too_long", "templates")
    return found


async def _score(
    service: Service, pictures: Pictures, labels: tuple[str, ...], templates: tuple[str, ...], options: ZeroShotOptions
) -> Scored:
    """Scores of the pictures that could be had, and the errors of the others. A single one's error is raised."""
    there = [i for i in range(len(pictures.data)) if i not in pictures.errors]
    if there:
        readable = [pictures.data[i] for i in there]
        scored = await service.zero_shot(readable, labels, templates, options.kind, options.model)
    else:  # every one has an error already: there is nothing to ask the towers for
        scored = Scored(service.pick(options.model), np.zeros((0, len(labels)), np.float32), {}, {})
    errors = pictures.errors | {there[i]: error for i, error in scored.errors.items()}
    for index, error in errors.items():
        error.param = "image" if pictures.single else f"images[{index}]"
    if pictures.single and errors:
        raise errors[0]
    scores = np.zeros((len(pictures.data), len(labels)), np.float32)
    scores[there] = scored.scores
    return Scored(scored.version, scores, errors, scored.seconds)


async def _embed(
    service: Service,
    intake: Intake,
    items: Sequence[str],
    modalities: Sequence[str],
    body: EmbeddingsRequest | RankRequest,
) -> tuple[np.ndarray, str, int]:
    """Features [K, E] of texts and pictures in their order, by which version, and the tokens of the texts."""
    if len(items) > service.config.limits.max_texts:
        message = f"{len(items)} inputs; at most {service.config.limits.max_texts} are allowed"
        raise RequestError(422, message, "too_many", "input")
    texts = [i for i, kind in enumerate(modalities) if kind == "text"]
    images = [i for i, kind in enumerate(modalities) if kind == "image"]
    service.check_texts([items[i] for i in texts], "input")
    pictures = await intake.pictures([items[i] for i in images], "input", single=False) if images else None
    if pictures is not None and pictures.errors:
        raise next(iter(pictures.errors.values()))

    async def ask(version: str) -> tuple[np.ndarray, str, int]:
        parts, tokens = [], 0
        if texts:
            parts.append((texts, await service.encode_texts(version, [items[i] for i in texts])))
            tokens = await service.count_tokens(version, [items[i] for i in texts])
        if pictures is not None:
            parts.append((images, await service.encode_images(version, pictures.data)))
        features = np.zeros((len(items), parts[0][1].features.shape[1]), np.float32)
        for places, encoded in parts:
            for index, error in encoded.errors.items():
                raise RequestError(error.status, error.message, error.code, f"input[{places[index]}]")
            features[places] = encoded.features
        return features, version, tokens

    return await service.on_version(body.model, ask)


def _check_name(name: str) -> None:
    """Raise RequestError for a label set's name that cannot be a file's, in which the set may be kept."""
    if len(quote(name, safe="")) > _MAX_NAME:
        message = f"the name is too long: at most {_MAX_NAME} bytes, of which others than letters and digits count as 3"
        raise RequestError(422, message, "text_too_long", "name")


def _modalities(body: EmbeddingsRequest, items: Sequence[str]) -> list[str]:
    return [body.modality or ("image" if item.startswith("data:image/") else "text") for item in items]


def _rank_item(item: str | RankItem) -> RankItem:
    return RankItem(text=item) if isinstance(item, str) else item


def _best(row: np.ndarray, labels: Sequence[str], top_k: int | None) -> list[Prediction]:
    """Labels by falling score; equal ones in the order of the request."""
    order = np.argsort(-row, kind="stable")[:top_k]
    return [Prediction.model_construct(label=labels[i], score=float(row[i]), index=int(i)) for i in order]


def _numbers(row: np.ndarray, encoding_format: str) -> list[float] | str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if encoding_format == "base64" else row.tolist()


def _answer(content: BaseModel, version: str = "", seconds: dict[str, float] | None = None) -> Response:
    return _json(content.model_dump_json(exclude_none=True), _headers(version, seconds or {}))


def _json(content: str, headers: dict[str, str], status: int = 200) -> Response:
    return Response(content, status, headers, media_type="application/json")


def _headers(version: str, seconds: dict[str, float]) -> dict[str, str]:
    headers = {"X-Model-Version": version} if version else {}
    if seconds:
        headers["Server-Timing"] = ", ".join(f"{stage};dur={1000 * s:.2f}" for stage, s in seconds.items())
    return headers


def _zero_shot_bodies() -> dict[str, Any]:
    """What OpenAPI says of the bodies, which the route reads by itself."""
    options = ZeroShotOptions.model_json_schema()["properties"]
    form = {"type": "object", "properties": {"images": _files(), **options}, "required": ["images"]}
    query = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": "with a picture's bytes"}
        for name, schema in options.items()
    ]
    content = {
        "application/json": {"schema": ZeroShotRequest.model_json_schema()},
        "multipart/form-data": {"schema": form},
        "image/*": {"schema": {"type": "string", "format": "binary"}},
    }
    return {"requestBody": {"required": True, "content": content}, "parameters": query}


def _files() -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string", "format": "binary"}}


def _probe_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "grey").save(file, "PNG")
    return file.getvalue()
