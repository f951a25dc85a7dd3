"""What an ingress replica does for a request: choose a version, get its class matrix, ask the towers, score.

Shapes: N pictures, C classes, E embedding, K candidates.
"""

import asyncio
import contextvars
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from rayclip.errors import UserError
from rayclip.inference.prompts import DEFAULT_TEMPLATES, resolve_templates
from rayclip.inference.zero_shot import check_class_names, independent_scores, zero_shot_probabilities
from rayclip.serve.cache import LruCache
from rayclip.serve.config import ServeConfig
from rayclip.serve.images import RequestError
from rayclip.serve.metrics import IngressMetrics, collect
from rayclip.serve.middleware.auth import KeyRing
from rayclip.serve.schemas import LabelSetInfo, ModelsResponse, Scores, ServedModel
from rayclip.serve.towers.encoders import ClassMatrix, Encoded
from rayclip.serve.versions.routing_table import Phase, ReplicaReport, RoutingTable

Result = TypeVar("Result")

_logger = logging.getLogger("ray.serve")
_GONE = (RayActorError, DeploymentUnavailableError)
"""What a call raises whose replica went away: it may be made again elsewhere, since it changes nothing."""
_TRIES = 5
# Pictures a call: a request with many is spread over the replicas.
_PICTURES_A_CALL = 8
# What OpenAI's and other clients send where they must send something.
_ANY_MODEL = ("", "clip", "default")


@dataclass
class Scored:
    """Scores of N pictures, float32 [N, C], by which version, and the time that each stage took, in seconds."""

    version: str
    scores: np.ndarray
    errors: dict[int, RequestError]
    seconds: dict[str, float]
    cut_labels: tuple[int, ...] = ()
    """Labels whose prompts are longer than the model reads."""


class Service:
    """One ingress replica's part. Everything here may be cancelled with its request."""

    def __init__(
        self,
        config: ServeConfig,
        image: DeploymentHandle,
        text: DeploymentHandle,
        coordinator: DeploymentHandle,
        keys: KeyRing | None = None,
    ) -> None:
        self.config = config
        self._keys = keys
        self.metrics = IngressMetrics()
        self._image, self._text, self._coordinator = image, text, coordinator
        self._matrices: LruCache[ClassMatrix] = LruCache(config.cache_bytes, lambda matrix: matrix.num_bytes)
        self._computing: dict[Any, asyncio.Task[ClassMatrix]] = {}
        self._table = RoutingTable({}, {})
        self._label_sets: dict[str, LabelSetInfo] = {}
        self._healthy_until = 0.0
        self._has_been_ready = False

    async def start(self) -> None:
        """Learn what there is to serve, and stay up to date."""
        torch.set_num_threads(1)
        self._replica = serve.get_replica_context().replica_id.unique_id
        await self._refresh()
        self._polling = asyncio.create_task(self._poll())

    @property
    def phase(self) -> Phase:
        """Whether the service goes on, or is about to stop."""
        return self._table.phase

    def pick(self, model: str | None) -> str:
        """A version for a request: the one it names, or one by the shares of the traffic. Raises RequestError."""
        self._check_loaded()
        names = {version.partition("/")[0] for version in self._table.sources}
        if model is None or model in _ANY_MODEL or model in names:
            versions, shares = zip(*self._table.traffic.items(), strict=True)
            return random.choices(versions, shares)[0]
        if model not in self._table.sources:
            known = ", ".join(self._table.sources)
            raise RequestError(
                404, f"no model '{model[:100]}' is loaded; there are: {known}", "model_not_found", "model"
            )
        return model

    async def zero_shot(
        self,
        images: Sequence[bytes],
        labels: Sequence[str],
        templates: tuple[str, ...],
        kind: Scores,
        model: str | None = None,
    ) -> Scored:
        """Scores of the pictures under the labels. Raises RequestError."""

        async def ask(version: str) -> Scored:
            async with asyncio.TaskGroup() as group:
                matrix = group.create_task(self.class_matrix(version, labels, templates))
                encoded = group.create_task(self.encode_images(version, images))
            started = time.perf_counter()
            scores = score(encoded.result().features, matrix.result(), kind)
            seconds = encoded.result().seconds | {"score": time.perf_counter() - started}
            return Scored(version, scores, encoded.result().errors, seconds, matrix.result().cut)

        return await self.on_version(model, ask)

    async def on_version(self, model: str | None, ask: Callable[[str], Awaitable[Result]]) -> Result:
        """Ask a version; one that has just been retired is replaced by the one that took over."""
        try:
            return await _unwrapped(ask(self.pick(model)))
        except RequestError as error:
            if error.code != "model_not_loaded":
                raise
        await self._refresh()
        return await _unwrapped(ask(self.pick(model)))

    async def class_matrix(self, version: str, labels: Sequence[str], templates: tuple[str, ...]) -> ClassMatrix:
        """From the cache, or from the text tower, asked once however many wait for it."""
        key = (version, templates, tuple(labels))
        if (matrix := self._matrices.get(key)) is not None:
            return matrix
        if key not in self._computing:
            # In a context of its own: Ray cancels what was called in a request's context once its client has left.
            self._computing[key] = asyncio.create_task(self._compute(key), context=contextvars.Context())
        # Shielded: the matrix is worth finishing, and others may wait for it.
        return await asyncio.shield(self._computing[key])

    async def _compute(self, key: tuple[str, tuple[str, ...], tuple[str, ...]]) -> ClassMatrix:
        version, templates, labels = key
        try:
            matrix = await self._call(self._text.class_matrix, version, labels, templates)
            self._matrices.put(key, matrix)
            return matrix
        finally:
            del self._computing[key]

    async def encode_images(self, version: str, images: Sequence[bytes]) -> Encoded:
        """Features of pictures, spread over the replicas."""
        started = time.perf_counter()
        parts = [images[i : i + _PICTURES_A_CALL] for i in range(0, len(images), _PICTURES_A_CALL)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._call(self._image.encode, version, part)) for part in parts]
        encoded = _joined([task.result() for task in tasks])
        # What the replicas do not know of: their queues before Python, and the way there and back.
        encoded.seconds["call"] = time.perf_counter() - started - sum(encoded.seconds.values())
        return encoded

    async def encode_texts(self, version: str, texts: Sequence[str]) -> Encoded:
        """Return the features of texts."""
        return await self._call(self._text.encode, version, list(texts))

    def templates_of(self, templates: str | Sequence[str] | None, model: str | None = None) -> tuple[str, ...]:
        """The request's templates, or else the service's, or else those of the model. Raises RequestError."""
        limits = self.config.limits
        try:
            resolved = resolve_templates(self._default_templates(model) if templates is None else templates)
        except UserError as error:
            raise RequestError(422, str(error)[:300], "invalid_templates", "templates") from None
        if len(resolved) > limits.max_templates:
            raise _too_many("templates", len(resolved), limits.max_templates)
        self.check_texts(resolved, "templates")
        return resolved

    def _default_templates(self, model: str | None) -> str | Sequence[str]:
        """What the settings say, else what the model was measured with: the named one, or the one with most traffic."""
        if self.config.templates is not None:
            return self.config.templates
        traffic = self._table.traffic
        version = model if model in self._table.sources else max(traffic, key=traffic.__getitem__, default="")
        return self._table.templates.get(version or "", DEFAULT_TEMPLATES)

    def labels_of(self, labels: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
        """The labels, once they and what the templates make of them are within the limits. Raises RequestError."""
        limits = self.config.limits
        if len(labels) > limits.max_labels:
            raise _too_many("labels", len(labels), limits.max_labels)
        if len(labels) * len(templates) > limits.max_prompts:
            raise _too_many("labels times templates", len(labels) * len(templates), limits.max_prompts)
        self.check_texts(labels, "labels")
        try:
            check_class_names(labels)
        except UserError as error:
            raise RequestError(422, str(error), "invalid_labels", "labels") from None
        # A template may name its place a thousand times: 2,000 long labels in one such template were four gigabytes.
        longest = max(len(label) for label in labels)
        limit = 2 * limits.max_text_chars
        if any(len(template) + template.count("{}") * longest > limit for template in templates):
            message = f"a template and a label together are longer than {limit} characters"
            raise RequestError(422, message, "text_too_long", "templates")
        return tuple(labels)

    def check_texts(self, texts: Sequence[str], param: str) -> None:
        """Raise RequestError where one is too long."""
        for index, text in enumerate(texts):
            self.check_text(text, f"{param}[{index}]")

    def check_text(self, text: str, name: str) -> None:
        """Raise RequestError where it has too many characters."""
        limit = self.config.limits.max_text_chars
        if len(text) > limit:
            message = f"{name} has {len(text)} characters; at most {limit} are read"
            raise RequestError(422, message, "text_too_long", name)

    async def label_set(self, name: str) -> LabelSetInfo:
        """A registered label set. Raises RequestError where there is none of that name."""
        if name not in self._label_sets:
            await self.label_sets()
        if name not in self._label_sets:
            known = ", ".join(list(self._label_sets)[:10]) or "none"
            message = f"no label set '{name[:100]}'; there are: {known}"
            raise RequestError(404, message, "label_set_not_found", "label_set")
        return self._label_sets[name]

    async def label_sets(self) -> dict[str, LabelSetInfo]:
        """All registered label sets."""
        self._label_sets = await self._call(self._coordinator.label_sets)
        return self._label_sets

    async def put_label_set(self, label_set: LabelSetInfo) -> None:
        """Register a label set, or replace it."""
        await self._call(self._coordinator.put_label_set, label_set)
        await self.label_sets()

    async def delete_label_set(self, name: str) -> None:
        """Forget a label set. Raises RequestError where there is none of that name."""
        if not await self._call(self._coordinator.delete_label_set, name):
            raise RequestError(404, f"no label set '{name[:100]}'", "label_set_not_found", "label_set")
        await self.label_sets()

    async def models(self) -> ModelsResponse:
        """What is loaded, with its share of the traffic, and what is wrong."""
        return await self._call(self._coordinator.models)

    async def model(self, name: str) -> ServedModel:
        """A version by its id, or by its model's name the one with most traffic. Raises RequestError."""
        models = (await self.models()).data
        named = [model for model in models if name in (model.id, model.id.partition("/")[0])]
        if not named:
            known = ", ".join(model.id for model in models)
            raise RequestError(404, f"no model '{name[:100]}'; there are: {known}", "model_not_found", "model")
        return max(named, key=lambda model: (model.id == name, model.share))

    async def prometheus(self) -> bytes:
        """Return the whole service's figures in Prometheus' text form."""
        await self._refresh()
        return await self._call(self._coordinator.metrics)

    async def check(self, image: bytes) -> None:
        """Run both towers of every version that has traffic. Raises what they raise; an answer holds for a second.

        Raises RequestError 503 while the models are being loaded, and once the service is about to stop.
        """
        self._check_loaded()
        if self.phase != "serving":
            raise RequestError(503, "the service is stopping", "stopping")
        if time.monotonic() < self._healthy_until:
            return
        await _unwrapped(self._probe(image))
        self._healthy_until = time.monotonic() + 1

    def _check_loaded(self) -> None:
        """Raise RequestError until the towers are loaded; a tower that is replaced later is waited for instead."""
        if not self._has_been_ready:
            what = " and ".join(f"the {tower} tower" for tower in self._table.loading)
            raise RequestError(503, f"the model is being loaded: {what or 'all'} is not ready", "loading")

    async def _probe(self, image: bytes) -> None:
        async with asyncio.TaskGroup() as group:
            for version in self._table.traffic:
                group.create_task(self.encode_images(version, [image]))
                group.create_task(self.encode_texts(version, ["a probe"]))

    async def _call(self, method: Any, *args: Any) -> Any:
        """Call another deployment, again where the replica that had it went away. Raises RequestError."""
        for attempt in range(_TRIES):
            response = method.remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RequestError as error:  # which Ray hands over inside one of its own
                raise (error.cause if isinstance(error, RayTaskError) else error) from None
            except BackPressureError:
                raise RequestError(429, "the service is busy: try again in a second", "overloaded") from None
            except _GONE:
                if attempt == _TRIES - 1:
                    raise
                self.metrics.retries.inc()
                await asyncio.sleep(0.05 * 2**attempt)
        raise AssertionError("unreachable")

    async def _refresh(self) -> None:
        self.metrics.cache_hits.set(self._matrices.hits)
        self.metrics.cache_misses.set(self._matrices.misses)
        self.metrics.cache_bytes.set(self._matrices.num_bytes)
        self.metrics.keys_stale.set(bool(self._keys and self._keys.problem))
        figures, running = collect(self.metrics.registry), self.metrics.num_running
        report = ReplicaReport(self._replica, "ingress", metrics=figures, running=running)
        self._table = await self._call(self._coordinator.report, report)
        self._has_been_ready = self._has_been_ready or not self._table.loading
        self._matrices.drop(lambda key: key[0] not in self._table.sources)  # type: ignore[index]  # a tuple

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_s)
            try:
                await self._refresh()
                await self.label_sets()
                if self._keys is not None:
                    await self._keys.reload()
            except Exception as error:  # the coordinator is being replaced: what is known holds
                _logger.debug("no word from the coordinator: %s", type(error).__name__)


def score(features: np.ndarray, matrix: ClassMatrix, kind: Scores) -> np.ndarray:
    """Scores [N, C] of features [N, E] under a class matrix."""
    image, classes = torch.from_numpy(features), torch.from_numpy(matrix.rows)
    if kind == "softmax":
        return zero_shot_probabilities(image, classes, matrix.logit_scale).numpy()
    if kind == "sigmoid":
        return independent_scores(image, classes, torch.from_numpy(matrix.background), matrix.logit_scale).numpy()
    return (image @ classes.T).clamp(-1, 1).numpy()  # rounding goes beyond


def _joined(parts: Sequence[Encoded]) -> Encoded:
    errors: dict[int, RequestError] = {}
    start = 0
    for part in parts:
        errors |= {start + index: error for index, error in part.errors.items()}
        start += len(part.features)
    slowest = max(parts, key=lambda part: sum(part.seconds.values()))
    return Encoded(np.concatenate([part.features for part in parts]), errors, slowest.seconds)


def truncated(names: Sequence[str]) -> RequestError:
    """What is said of texts that are longer than the model reads: as an error, or as a notice in the answer."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    message = f"{names[0]}{more}: longer than the model reads; what is beyond its context length is cut off"
    return RequestError(422, message, "text_truncated", names[0])


def _too_many(what: str, number: int, limit: int) -> RequestError:
    return RequestError(422, f"{number} {what}; at most {limit} are allowed", "too_many", what.split()[0])


async def _unwrapped(work: Awaitable[Result]) -> Result:
    """The first RequestError of a task group by itself."""
    try:
        return await work
    except ExceptionGroup as group:
        refused = group.subgroup(RequestError)
        if refused is None:
            raise
        raise _first(refused) from None


def _first(group: ExceptionGroup) -> Exception:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first
