"""What both towers' deployments share: loading the versions that the coordinator wants, batching, reporting, health."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from rayclip.models.clip import CLIP
from rayclip.serve.config import EncoderConfig, ServeConfig
from rayclip.serve.images import RequestError
from rayclip.serve.metrics import EncoderMetrics, collect
from rayclip.serve.towers.batching import GatherQueue, QueueFullError
from rayclip.serve.versions.routing_table import ModelInfo, ReplicaReport, RoutingTable, VersionSource
from rayclip.training.checkpoint import load_model

Item = TypeVar("Item")

_logger = logging.getLogger("ray.serve")
_RETRY_LOAD_S = 15


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
