"""The routes that answer with the model: each reads a request, asks the service, and forms the answer."""

import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response

from rayclip.serve.images import RequestError
from rayclip.serve.request_parser import RequestImages, RequestParser
from rayclip.serve.responses import answer, json_response, timing_headers
from rayclip.serve.schemas import (
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    HuggingFaceRequest,
    ImageResult,
    LabelScore,
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
from rayclip.serve.service import Scored, Service


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
            model=scored.version, templates=list(templates), scores=options.kind, results=results
        )
        return answer(response, scored.version, {"read": read} | scored.seconds)

    @api.post("/v1/zero-shot-image-classification", response_model=list[LabelScore])
    async def hugging_face(body: HuggingFaceRequest) -> Response:
        """The Hugging Face task of that name: a flat list, best label first."""
        asked = body.parameters
        template = asked.hypothesis_template
        options = ZeroShotOptions(labels=asked.candidate_labels, templates=None if template is None else [template])
        picture = body.inputs if isinstance(body.inputs, str) else body.inputs.image
        pictures = await parser.images([picture], "inputs", single=True)
        labels, templates = await _labels_and_templates(service, options)
        scored = await _score(service, pictures, labels, templates, options)
        best = [LabelScore(label=p.label, score=p.score) for p in _best(scored.scores[0], labels, None)]
        content = "[" + ",".join(each.model_dump_json() for each in best) + "]"
        return json_response(content, timing_headers(scored.version, scored.seconds))

    @api.post("/v1/embeddings", response_model=EmbeddingsResponse)
    async def embeddings(body: EmbeddingsRequest) -> Response:
        """Features of texts and pictures, of length 1, in OpenAI's form."""
        items = [body.input] if isinstance(body.input, str) else body.input
        features, version, tokens = await _embed(service, parser, items, _modalities(body, items), body)
        if body.dimensions not in (None, features.shape[1]):
            message = f"dimensions must be {features.shape[1]}: a CLIP's features do not nest"
            raise RequestError(422, message, "invalid_dimensions", "dimensions")
        data = [Embedding(index=i, embedding=_numbers(row, body.encoding_format)) for i, row in enumerate(features)]
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        return answer(EmbeddingsResponse(data=data, model=version, usage=usage), version, {})

    @api.post("/v1/rank", response_model=RankResponse)
    async def rank(body: RankRequest) -> Response:
        """Candidates by their similarity to the query, best first; both may be texts or pictures."""
        items = [_rank_item(item) for item in [body.query, *body.candidates]]
        values = [item.text or item.image or "" for item in items]
        kinds = ["text" if item.text is not None else "image" for item in items]
        features, version, _ = await _embed(service, parser, values, kinds, body)
        cosines = features[1:] @ features[0]
        scale = next((m.logit_scale for m in await service.models() if m.id == version), None) or 1.0
        probabilities = torch.from_numpy(scale * cosines).softmax(dim=0).numpy()
        order = np.argsort(-cosines, kind="stable")[: body.top_k]
        ranked = [Ranked(index=i, score=float(cosines[i]), probability=float(probabilities[i])) for i in order]
        return answer(RankResponse(model=version, results=ranked), version, {})


async def _labels_and_templates(service: Service, options: ZeroShotOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    labels, templates = options.labels, options.templates
    if options.label_set is not None:
        known = await service.label_set(options.label_set)
        labels, templates = known.labels, known.templates if templates is None else templates
    resolved = service.templates_of(templates)
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
    parser: RequestParser,
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
    pictures = await parser.images([items[i] for i in images], "input", single=False) if images else None
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
