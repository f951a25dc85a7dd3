"""One actor that the other replicas ask: it watches the registry, swaps versions, keeps label sets and metrics."""

import asyncio
import json
import logging
import time
from urllib.parse import quote

from rayclip.errors import UserError
from rayclip.io.files import write_text
from rayclip.io.paths import StoragePath, matching, storage_path
from rayclip.serve.config import ServeConfig
from rayclip.serve.images import RequestError
from rayclip.serve.metrics import render
from rayclip.serve.schemas import LabelSetInfo, ServedModel
from rayclip.serve.versions.rollout import Rollout
from rayclip.serve.versions.routing_table import ReplicaReport, RoutingTable, VersionSource
from rayclip.tracking.registry import fetch, find_version, is_registered, resolve_model

_logger = logging.getLogger("ray.serve")
# A busy replica may be late with its word; a dead one must not hold a swap up for long.
_FRESH_POLLS = 5
_LEAST_FRESH_S = 10


class Coordinator:
    """Small and replaceable: where it dies, the others go on with what it said last, and a new one asks MLflow."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        self._config = config
        self._roles = {"champion": config.model} | ({"canary": config.canary} if config.canary else {})
        shares = {"champion": 1.0 - config.canary_share, "canary": config.canary_share}
        self._rollout = Rollout(shares, max(_LEAST_FRESH_S, _FRESH_POLLS * config.poll_s), config.retire_s)
        self._started = int(time.time())
        self._label_sets = _read_label_sets(config)
        for role, uri in self._roles.items():
            await self._look(role, uri)
        self._watching = asyncio.create_task(self._watch())

    async def report(self, report: ReplicaReport) -> RoutingTable:
        """A replica's word; the answer is what it is to do."""
        self._rollout.hear(report, time.monotonic())
        self._advance()
        return self._rollout.table()

    async def models(self) -> list[ServedModel]:
        """Every version that is loaded or being loaded."""
        table = self._rollout.table()
        return [self._describe(version, table.traffic.get(version, 0.0)) for version in table.sources]

    async def metrics(self) -> bytes:
        """All replicas' figures in Prometheus' text form."""
        return render({report.replica: report.metrics for report in self._rollout.reports()})

    async def label_sets(self) -> dict[str, LabelSetInfo]:
        """The named label sets."""
        return self._label_sets

    async def put_label_set(self, label_set: LabelSetInfo) -> None:
        """Add a label set, or replace the one of that name. Raises RequestError where there are too many."""
        limit = self._config.limits.max_label_sets
        if label_set.name not in self._label_sets and len(self._label_sets) >= limit:
            raise RequestError(422, f"there are {limit} label sets already: delete one first", "too_many_label_sets")
        if self._config.state_folder:
            path = _label_set_path(self._config.state_folder, label_set.name)
            await asyncio.to_thread(write_text, path, label_set.model_dump_json(indent=1))
        self._label_sets = {**self._label_sets, label_set.name: label_set}

    async def delete_label_set(self, name: str) -> bool:
        """Forget a label set. Says whether there was one."""
        if name not in self._label_sets:
            return False
        if self._config.state_folder:
            _label_set_path(self._config.state_folder, name).unlink(missing_ok=True)
        self._label_sets = {key: value for key, value in self._label_sets.items() if key != name}
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_s)
            for role, uri in self._roles.items():
                if is_registered(uri):
                    try:
                        await self._look(role, uri)
                    except UserError as error:  # what is loaded goes on serving
                        _logger.warning("%s stays as it is: %s", role, error)
            self._advance()

    async def _look(self, role: str, uri: str) -> None:
        """Ask what the role's URI stands for now, and fetch that where it is new. Raises UserError."""
        tracking_uri = self._config.tracking_uri
        if not is_registered(uri):
            source = await asyncio.to_thread(resolve_model, uri, tracking_uri)
        else:
            version = await asyncio.to_thread(find_version, uri, tracking_uri)
            if str(version) == self._rollout.wanted(role):
                return
            source = await asyncio.to_thread(fetch, version, tracking_uri)
            uri = f"models:/{version}"
        self._rollout.want(role, source.version, VersionSource(uri, str(source.folder)))

    def _advance(self) -> None:
        for role, old, new in self._rollout.advance(time.monotonic()):
            _logger.info("%s: %s takes over from %s", role, new, old)

    def _describe(self, version: str, share: float) -> ServedModel:
        info = self._rollout.info(version)
        return ServedModel(
            id=version,
            created=self._started,
            share=share,
            state=self._rollout.state(version),
            embed_dim=info.embed_dim if info else None,
            image_size=info.image_size if info else None,
            logit_scale=info.logit_scale if info else None,
            error=self._rollout.failure(version),
        )


def _read_label_sets(config: ServeConfig) -> dict[str, LabelSetInfo]:
    sets = {
        name: LabelSetInfo(name=name, labels=list(each.labels), templates=_plain(each.templates))
        for name, each in config.label_sets.items()
    }
    for path in matching(storage_path(config.state_folder), "label_sets/*.json") if config.state_folder else ():
        kept = LabelSetInfo.model_validate(json.loads(path.read_text()))
        sets[kept.name] = kept
    return sets


def _plain(templates: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(templates) if isinstance(templates, tuple) else templates


def _label_set_path(state_folder: str, name: str) -> StoragePath:
    return storage_path(state_folder) / "label_sets" / f"{quote(name, safe='')}.json"
