"""The two towers as deployments: each replica holds the versions that the coordinator wants, and batches for each.

Shapes: N pictures or texts, C classes, E embedding.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from torch import nn

from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.inference.encoder import Encoder
from rayclip.inference.prompts import fill
from rayclip.inference.zero_shot import class_prompts, mean_of_prompts
from rayclip.models.clip import CLIP
from rayclip.serve.cache import LruCache
from rayclip.serve.config import EncoderConfig, ServeConfig
from rayclip.serve.images import RequestError, decode_image
from rayclip.serve.metrics import EncoderMetrics, collect
from rayclip.serve.towers.batching import GatherQueue, QueueFullError
from rayclip.serve.versions.routing_table import ModelInfo, ReplicaReport, RoutingTable, VersionSource
from rayclip.training.checkpoint import load_model

Item = TypeVar("Item")

_logger = logging.getLogger("ray.serve")
_RETRY_LOAD_S = 15
BACKGROUND = ""
"""The empty class name: its row is what independent scores are measured against."""


@dataclass
class Encoded:
    """Features of the items that could be read, float32 [N, E] with zeros for the others, and why not, by index."""

    features: np.ndarray
    errors: dict[int, RequestError] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    """Of texts: tokens that were read, start and end included."""
    cut: tuple[int, ...] = ()
    """Texts that are longer than the model reads, by index."""


@dataclass
class ClassMatrix:
    """Rows of the classes, float32 [C, E], and of the background, [E]; the scale that cosines are multiplied by."""

    rows: np.ndarray
    background: np.ndarray
    logit_scale: float
    cut: tuple[int, ...] = ()
    """Classes with a prompt that is longer than the model reads."""

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the rows take."""
        return self.rows.nbytes + self.background.nbytes


@dataclass
class Loaded(Generic[Item]):
    """A version in a replica, with the queue that batches for it."""

    encoder: Encoder
    info: ModelInfo
    queue: GatherQueue[Item, np.ndarray]


class Tower(Generic[Item]):
    """What both deployments share: loading, reporting, health."""

    kind: Literal["image", "text"]

    async def _start(self, config: ServeConfig, settings: EncoderConfig, coordinator: DeploymentHandle) -> None:
        self._config, self._settings, self._coordinator = config, settings, coordinator
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._metrics = EncoderMetrics()
        # One thread runs the model, a batch at a time; the event loop stays free to gather the next.
        self._executor = ThreadPoolExecutor(1, "tower", torch.set_num_threads, (settings.threads,))
        self._device = choose_device(config.device, settings.num_gpus)
        self._models: dict[str, Loaded[Item]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, str] = {}
        self._retry_at = 0.0
        self._last_batch = 0.0
        self._table = await self._report()
        for version in self._table.sources:
            if version in self._table.traffic:
                await self._load(version)  # what it raises stops the replica: it has nothing to serve
        self._table = await self._report()  # that it is ready
        self._reporting = asyncio.create_task(self._report_forever())

    async def check_health(self) -> None:
        """Serve asks for this: the model answers, or has just done so."""
        if time.monotonic() - self._last_batch < self._config.health_period_s:
            return
        for loaded in list(self._models.values()):
            await loaded.queue.submit([self._probe(loaded)])

    async def _model(self, version: str) -> Loaded[Item]:
        """The version, loaded now where a request for it is here before the coordinator's word."""
        if version not in self._models:
            if version not in self._table.sources:
                self._table = await self._report()
            await self._load(version)
        return self._models[version]

    async def _load(self, version: str) -> None:
        """Load it, once however many ask. Raises RequestError where it is not to be had."""
        if version in self._models:
            return
        if version not in self._table.sources:
            raise RequestError(404, f"the model '{version}' is not loaded", "model_not_loaded", "model")
        if version not in self._loading:
            self._loading[version] = asyncio.create_task(self._load_one(version, self._table.sources[version]))
        try:
            # Shielded: one caller's end must not end the load for the others.
            await asyncio.shield(self._loading[version])
        except UserError:
            raise RequestError(503, f"the model '{version}' cannot be loaded", "model_failed", "model") from None

    async def _load_one(self, version: str, source: VersionSource) -> None:
        try:
            model = await asyncio.to_thread(read_model, source, self._config.tracking_uri)
            self._models[version] = self._wrap(version, model)
            self._failed.pop(version, None)
        except UserError as error:
            self._fail(version, str(error))
            raise
        except Exception as error:  # of weights that are no such model's, say: the version is at fault, not the replica
            _logger.exception("%s cannot be loaded", version)
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
            self._fail(version, why)
            raise UserError(why) from error
        finally:
            del self._loading[version]

    def _fail(self, version: str, why: str) -> None:
        if self._failed.get(version) != why:
            _logger.error("%s cannot be loaded by the %s tower: %s", version, self.kind, why)
        self._failed[version] = why
        self._retry_at = time.monotonic() + _RETRY_LOAD_S

    def _wrap(self, version: str, model: CLIP) -> Loaded[Item]:
        info = ModelInfo(
            embed_dim=model.text_projection.shape[1],
            image_size=model.visual.image_size,
            logit_scale=float(model.logit_scale.detach().exp()),
        )
        keep_tower(model, self.kind)
        encoder = Encoder(model.eval().requires_grad_(False), get_tokenizer(model.context_length), self._device)
        run = self._measured(version, self._runner(encoder))
        queue = GatherQueue(run, self._settings.max_batch_size, self._settings.max_waiting, self._executor)
        return Loaded(encoder, info, queue)

    def _measured(
        self, version: str, run: Callable[[list[Item]], list[np.ndarray]]
    ) -> Callable[[list[Item]], list[np.ndarray]]:
        batch = self._metrics.batch.labels(self.kind, version)
        seconds = self._metrics.seconds.labels(self.kind, version)

        def measured(items: list[Item]) -> list[np.ndarray]:
            started = time.perf_counter()
            results = run(items)
            self._last_run_s = time.perf_counter() - started
            self._last_batch = time.monotonic()
            batch.observe(len(items))
            seconds.observe(self._last_run_s)
            return results

        return measured

    async def _submit(self, loaded: Loaded[Item], items: list[Item]) -> list[np.ndarray]:
        try:
            return await loaded.queue.submit(items)
        except QueueFullError:
            raise self._full() from None

    def _full(self) -> RequestError:
        self._metrics.refused.labels(self.kind).inc()
        return RequestError(429, "the service is busy: try again in a second", "overloaded")

    async def _report(self) -> RoutingTable:
        self._metrics.waiting.labels(self.kind).set(sum(model.queue.waiting for model in self._models.values()))
        infos = {version: model.info for version, model in self._models.items()}
        report = ReplicaReport(self._replica, self.kind, infos, dict(self._failed), collect(self._metrics.registry))
        return await self._coordinator.report.remote(report)

    async def _report_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_s)
            try:
                self._table = await self._report()
            except Exception:  # the coordinator is being replaced: what is loaded goes on serving
                continue
            for version in set(self._models) - set(self._table.sources):
                del self._models[version]
            wanted = set(self._table.sources) - set(self._models)
            if time.monotonic() < self._retry_at:
                wanted -= set(self._failed)
            for version in wanted:
                await asyncio.gather(self._load(version), return_exceptions=True)  # told with the next report
            self._failed = {version: why for version, why in self._failed.items() if version in self._table.sources}

    def _runner(self, encoder: Encoder) -> Callable[[list[Item]], list[np.ndarray]]:
        raise NotImplementedError

    def _probe(self, loaded: Loaded[Item]) -> Item:
        raise NotImplementedError


class ImageEncoder(Tower[np.ndarray]):
    """Deployment of the image tower: from encoded pictures to features."""

    kind = "image"

    async def __init__(self, config: ServeConfig, coordinator: DeploymentHandle) -> None:  # type: ignore[misc]
        self._decoders = ThreadPoolExecutor(config.image_encoder.decode_threads, "decode")
        self._decoding = 0
        await self._start(config, config.image_encoder, coordinator)

    async def encode(self, version: str, images: Sequence[bytes]) -> Encoded:
        """Features of encoded pictures; one that cannot be read fails alone. Raises RequestError: 429 and 404."""
        loaded = await self._model(version)
        try:
            loaded.queue.check_room(len(images) + self._decoding)
        except QueueFullError:
            raise self._full() from None
        started = time.perf_counter()
        decoded = await self._decode(images, loaded.info.image_size)
        errors = {i: result for i, result in enumerate(decoded) if isinstance(result, RequestError)}
        for error in errors.values():
            self._metrics.broken.labels(error.code).inc()
        queued = time.perf_counter()
        rows = await self._submit(loaded, [result for result in decoded if isinstance(result, np.ndarray)])
        features = np.zeros((len(images), loaded.info.embed_dim), np.float32)
        readable = [i for i in range(len(images)) if i not in errors]
        if readable:
            features[readable] = rows
        tower = self._last_run_s if readable else 0.0
        waited = time.perf_counter() - queued - tower
        return Encoded(features, errors, {"decode": queued - started, "queue": waited, "tower": tower})

    async def _decode(self, images: Sequence[bytes], size: int) -> list[np.ndarray | RequestError]:
        loop = asyncio.get_running_loop()
        self._decoding += len(images)
        try:
            jobs = [
                loop.run_in_executor(self._decoders, decode_or_error, data, size, self._config.limits.max_pixels)
                for data in images
            ]
            return await asyncio.gather(*jobs)
        finally:
            self._decoding -= len(images)

    def _runner(self, encoder: Encoder) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        return lambda images: list(encoder.encode_images(np.stack(images)).cpu().numpy())

    def _probe(self, loaded: Loaded[np.ndarray]) -> np.ndarray:
        return np.zeros((loaded.info.image_size, loaded.info.image_size, 3), np.uint8)


class TextEncoder(Tower[str]):
    """Deployment of the text tower: texts to features, label lists to class matrices, of which rows are kept."""

    kind = "text"

    async def __init__(self, config: ServeConfig, coordinator: DeploymentHandle) -> None:  # type: ignore[misc]
        self._rows: LruCache[np.ndarray] = LruCache(config.cache_bytes, lambda row: row.nbytes)
        await self._start(config, config.text_encoder, coordinator)

    async def encode(self, version: str, texts: Sequence[str]) -> Encoded:
        """Features of texts. Raises RequestError: 429 and 404."""
        loaded = await self._model(version)
        started = time.perf_counter()
        rows, lengths = await asyncio.gather(
            self._submit(loaded, list(texts)), asyncio.to_thread(count_tokens, loaded.encoder, texts)
        )
        most = loaded.encoder.model.context_length
        seconds = {"text": time.perf_counter() - started}
        cut = tuple(np.flatnonzero(lengths > most).tolist())
        return Encoded(np.stack(rows), {}, seconds, int(lengths.clip(max=most).sum()), cut)

    async def class_matrix(self, version: str, labels: Sequence[str], templates: tuple[str, ...]) -> ClassMatrix:
        """The rows of the labels, and of the background, under the templates. Raises RequestError: 429 and 404.

        Only rows that are not known yet cost work: a list that differs by a label costs that label.
        """
        loaded = await self._model(version)
        wanted = list(dict.fromkeys([BACKGROUND, *labels]))
        found = {label: self._rows.get((version, templates, label)) for label in wanted}
        rows = {label: row for label, row in found.items() if row is not None}
        missing = [label for label in wanted if label not in rows]
        if missing:
            prompts, places = class_prompts(missing, templates)
            features = torch.from_numpy(np.stack(await self._submit(loaded, prompts)))
            for label, row in zip(missing, mean_of_prompts(features, places).numpy(), strict=True):
                # A copy: a view would keep its whole matrix alive.
                rows[label] = row.copy()
                self._rows.put((version, templates, label), rows[label])
        matrix = np.stack([rows[label] for label in labels])
        cut = await asyncio.to_thread(labels_cut, loaded.encoder, labels, templates)
        return ClassMatrix(matrix, rows[BACKGROUND], loaded.info.logit_scale, cut)

    def _runner(self, encoder: Encoder) -> Callable[[list[str]], list[np.ndarray]]:
        return lambda texts: list(encoder.encode_texts(texts).cpu().numpy())

    def _probe(self, loaded: Loaded[str]) -> str:
        return "a probe"


def decode_or_error(data: bytes, size: int, max_pixels: int) -> np.ndarray | RequestError:
    """The picture as the tower takes it, or why not."""
    try:
        return decode_image(data, size, max_pixels)
    except RequestError as error:
        return error


def count_tokens(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, start and end included, int32 [N]: of one that is cut, one more than the model reads."""
    return get_tokenizer(encoder.model.context_length + 1)(texts)[1]


def labels_cut(encoder: Encoder, labels: Sequence[str], templates: Sequence[str]) -> tuple[int, ...]:
    """Which labels make a prompt, under one of the templates, that is longer than the model reads."""
    most = encoder.model.context_length
    # A token has a byte at least: plain prompts that are short need no counting.
    suspects = [
        (index, prompt)
        for index, label in enumerate(labels)
        for prompt in (fill(template, label) for template in templates)
        if len(prompt) + 2 > most or not prompt.isascii()
    ]
    if not suspects:
        return ()
    places = np.array([index for index, _ in suspects])
    lengths = count_tokens(encoder, [prompt for _, prompt in suspects])
    return tuple(np.unique(places[lengths > most]).tolist())


def read_model(source: VersionSource, tracking_uri: str | None) -> CLIP:
    """The model from the folder where that is on this machine too, else fetched by its URI. Raises UserError."""
    if Path(source.folder).exists():
        return load_model(source.folder)
    # Here, since MLflow takes seconds to import and a replica beside the coordinator does not need it.
    from rayclip.tracking.registry import resolve_model

    return load_model(resolve_model(source.uri, tracking_uri).folder)


def keep_tower(model: CLIP, kind: Literal["image", "text"]) -> None:
    """Let go of the other tower's weights."""
    empty: Any = nn.Identity()
    if kind == "image":
        model.transformer = model.token_embedding = empty
    else:
        model.visual = empty


def choose_device(wanted: str, num_gpus: float) -> str:
    """Where a replica computes: on its GPU where it was given one."""
    if wanted == "auto":
        return "cuda" if num_gpus else "cpu"
    return wanted
