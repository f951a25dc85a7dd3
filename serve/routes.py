"""The routes that answer with the model: each reads a request, asks the service, and forms the answer."""

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response

from rayclip.serve.images import RequestError, is_data_uri
from rayclip.serve.request_parser import RequestImages, RequestParser
from rayclip.serve.responses import answer, json_response, timing_headers
from rayclip.serve.schemas import (
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    HuggingFaceRequest,
    ImageResult,
    LabelScore,
    Notice,
    Prediction,
    Ranked,
    RankItem,
    RankRequest,
    RankResponse,
    Usage,
    ZeroShotOptions,
    ZeroShotRequest,
    ZeroShotResponse,
)
from rayclip.serve.service import Scored, Service, truncated

_MOST_NAMED = 20
"""Parts of a request that a notice names; it says how many more there are."""


def add_answer_routes(api: FastAPI, service: Service, parser: RequestParser) -> None:
    """Zero-shot, the Hugging Face task, embeddings and ranks."""

    @api.post("/v1/zero-shot", openapi_extra=_zero_shot_bodies(), response_model=ZeroShotResponse)
    async def zero_shot(request: Request) -> Response:
        """Classify pictures into labels that the request names.

        JSON, a form with files under `image` or `images`, or a picture's bytes with the options in the query. Of
        several pictures, one that cannot be read has its error in place of predictions; a single one is a 422.
        """
        started = time.perf_counter()
        pictures, options = await parser.zero_shot(request)
        read = time.perf_counter() - started
        labels, templates = await _labels_and_templates(service, options)
        scored = await _score(service, pictures, labels, templates, options)
        results = [
            ImageResult(index=i, error=scored.errors[i].to_error())
            if i in scored.errors
            else ImageResult(index=i, predictions=_best(row, labels, options.top_k))
            for i, row in enumerate(scored.scores)
        ]
        response = ZeroShotResponse(
            model=scored.version,
            templates=list(templates),
            scores=options.kind,
            results=results,
            warnings=_notices([f"labels[{index}]" for index in scored.cut_labels]),
        )
        return answer(response, scored.version, {"read": read} | scored.seconds)

    @api.post("/", response_model=list[LabelScore], operation_id="hugging_face_root")
    @api.post("/v1/zero-shot-image-classification", response_model=list[LabelScore])
    async def hugging_face(body: HuggingFaceRequest) -> Response:
        """The Hugging Face task of that name: a flat list, best label first.

        A notice, which the list has no room for, is in the header X-Warning.
        """
        asked = body.parameters
        template = asked.hypothesis_template
        options = ZeroShotOptions(labels=asked.candidate_labels, templates=None if template is None else [template])
        picture = body.inputs if isinstance(body.inputs, str) else body.inputs.image
        pictures = await parser.images([picture], "inputs", single=True)
        labels, templates = await _labels_and_templates(service, options)
        scored = await _score(service, pictures, labels, templates, options)
        best = [LabelScore(label=p.label, score=p.score) for p in _best(scored.scores[0], labels, None)]
        content = "[" + ",".join(each.model_dump_json() for each in best) + "]"
        notices = _notices([f"candidate_labels[{index}]" for index in scored.cut_labels]) or []
        headers = {"X-Warning": "; ".join(notice.message for notice in notices)} if notices else {}
        return json_response(content, timing_headers(scored.version, scored.seconds) | headers)

    @api.post("/v1/embeddings", response_model=EmbeddingsResponse)
    async def embeddings(body: EmbeddingsRequest) -> Response:
        """Features of texts and images, of length 1, in OpenAI's form."""
        single = isinstance(body.input, str)
        values = [body.input] if isinstance(body.input, str) else body.input
        names = ["input"] if single else [f"input[{i}]" for i in range(len(values))]
        items = [_Item(v, _kind(v, body.modality), name) for v, name in zip(values, names, strict=True)]
        embedded = await _embed(service, parser, items, "input", body)
        features = embedded.features
        if body.dimensions not in (None, features.shape[1]):
            message = f"dimensions must be {features.shape[1]}: a CLIP's features do not nest"
            raise RequestError(422, message, "invalid_dimensions", "dimensions")
        data = [Embedding(index=i, embedding=_numbers(row, body.encoding_format)) for i, row in enumerate(features)]
        usage = Usage(
            prompt_tokens=embedded.num_tokens, total_tokens=embedded.num_tokens, truncated_texts=len(embedded.cut)
        )
        response = EmbeddingsResponse(
            data=data, model=embedded.version, usage=usage, warnings=_notices([items[i].name for i in embedded.cut])
        )
        return answer(response, embedded.version, {})

    @api.post("/v1/rank", response_model=RankResponse)
    async def rank(body: RankRequest) -> Response:
        """Candidates by their similarity to the query, best first; both may be texts or images."""
        names = [f"candidates[{i}]" for i in range(len(body.candidates))]
        items = [_rank_item(*each) for each in zip([body.query, *body.candidates], ["query", *names], strict=True)]
        embedded = await _embed(service, parser, items, "candidates", body)
        # Rounding takes the product of a feature with itself beyond 1.
        cosines = (embedded.features[1:] @ embedded.features[0]).clip(-1, 1)
        version = embedded.version
        scale = next((m.logit_scale for m in (await service.models()).data if m.id == version), None) or 1.0
        probabilities = torch.from_numpy(scale * cosines).softmax(dim=0).numpy()
        order = np.argsort(-cosines, kind="stable")[: body.top_k]
        ranked = [Ranked(index=i, score=float(cosines[i]), probability=float(probabilities[i])) for i in order]
        notices = _notices([items[i].name for i in embedded.cut])
        return answer(RankResponse(model=version, results=ranked, warnings=notices), version, {})


class _Item(NamedTuple):
    """A text, or an image as base64, a data: URI or a URL, and what errors call it."""

    value: str
    kind: Literal["text", "image"]
    name: str


@dataclass
class _Embedded:
    """Features [K, E] of a request's items, by which version; the tokens of the texts, and which items were cut."""

    features: np.ndarray
    version: str
    num_tokens: int
    cut: list[int]


async def _labels_and_templates(service: Service, options: ZeroShotOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    labels, templates = options.labels, options.templates
    if options.label_set is not None:
        known = await service.label_set(options.label_set)
        labels, templates = known.labels, known.templates if templates is None else templates
    resolved = service.templates_of(templates, options.model)
    return service.labels_of(labels or [], resolved), resolved


async def _score(
    service: Service,
    pictures: RequestImages,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    options: ZeroShotOptions,
) -> Scored:
    """Scores of the pictures that could be had, and the errors of the others. A single one's error is raised."""
    there = [i for i in range(len(pictures.data)) if i not in pictures.errors]
    if there:
        readable = [pictures.data[i] for i in there]
        scored = await service.zero_shot(readable, labels, templates, options.kind, options.model)
        if scored.cut_labels and not options.truncate:
            raise truncated([f"labels[{index}]" for index in scored.cut_labels])
    else:  # every one has an error already: there is nothing to ask the towers for
        scored = Scored(service.pick(options.model), np.zeros((0, len(labels)), np.float32), {}, {})
    errors = pictures.errors | {there[i]: error for i, error in scored.errors.items()}
    for index, error in errors.items():
        error.param = "image" if pictures.single else f"images[{index}]"
    if pictures.single and errors:
        raise errors[0]
    scores = np.zeros((len(pictures.data), len(labels)), np.float32)
    scores[there] = scored.scores
    return Scored(scored.version, scores, errors, scored.seconds, scored.cut_labels)


async def _embed(
    service: Service,
    parser: RequestParser,
    items: Sequence[_Item],
    param: str,
    body: EmbeddingsRequest | RankRequest,
) -> _Embedded:
    """Features of texts and images in their order. Raises RequestError that names the item."""
    limit = service.config.limits.max_texts + (param == "candidates")  # the query is one of the items
    if len(items) > limit:
        message = f"{len(items)} inputs; at most {limit} are allowed"
        raise RequestError(422, message, "too_many", param)
    texts = [i for i, item in enumerate(items) if item.kind == "text"]
    images = [i for i, item in enumerate(items) if item.kind == "image"]
    for i in texts:
        service.check_text(items[i].value, items[i].name)
    found = None
    if images:
        found = await parser.images(
            [items[i].value for i in images], param, single=False, names=[items[i].name for i in images]
        )
        if found.errors:
            raise next(iter(found.errors.values()))

    async def ask(version: str) -> _Embedded:
        parts = []
        if texts:
            parts.append((texts, await service.encode_texts(version, [items[i].value for i in texts])))
        if found is not None:
            parts.append((images, await service.encode_images(version, found.data)))
        features = np.zeros((len(items), parts[0][1].features.shape[1]), np.float32)
        for places, encoded in parts:
            for index, error in encoded.errors.items():
                raise RequestError(error.status, error.message, error.code, items[places[index]].name)
            features[places] = encoded.features
        cut = [texts[index] for index in parts[0][1].cut] if texts else []
        if cut and not body.truncate:
            raise truncated([items[i].name for i in cut])
        return _Embedded(features, version, parts[0][1].num_tokens, cut)

    return await service.on_version(body.model, ask)


def _notices(cut: list[str]) -> list[Notice] | None:
    """What the answer says of texts of which the end was not read."""
    if not cut:
        return None
    error = truncated(cut)
    return [Notice(code=error.code, message=error.message, params=cut[:_MOST_NAMED])]


def _kind(value: str, modality: Literal["text", "image"] | None = None) -> Literal["text", "image"]:
    return modality or ("image" if is_data_uri(value) else "text")


def _rank_item(item: str | RankItem, name: str) -> _Item:
    if isinstance(item, str):
        return _Item(item, _kind(item), name)
    if item.text is not None:
        return _Item(item.text, "text", f"{name}.text")
    return _Item(item.image or "", "image", f"{name}.image")


def _best(row: np.ndarray, labels: Sequence[str], top_k: int | None) -> list[Prediction]:
    """Labels by falling score; equal ones in the order of the request."""
    order = np.argsort(-row, kind="stable")[:top_k]
    return [Prediction.model_construct(label=labels[i], score=float(row[i]), index=int(i)) for i in order]


def _numbers(row: np.ndarray, encoding_format: str | None) -> list[float] | str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if encoding_format == "base64" else row.tolist()


def _zero_shot_bodies() -> dict[str, Any]:
    """What OpenAPI says of the bodies, which the route reads by itself."""
    options = ZeroShotOptions.model_json_schema()["properties"]
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"type": "object", "properties": {"images": files, **options}, "required": ["images"]}
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
