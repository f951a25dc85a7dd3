"""One actor that the other replicas ask: it watches the registry, swaps versions, keeps label sets and metrics."""

import asyncio
import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from rayclip.errors import UserError
from rayclip.io.files import write_text
from rayclip.io.paths import StoragePath, matching, storage_path
from rayclip.serve.config import ServeConfig
from rayclip.serve.images import RequestError
from rayclip.serve.metrics import CoordinatorMetrics, collect, render
from rayclip.serve.schemas import LabelSetInfo, ModelsResponse, Notice, ServedModel
from rayclip.serve.versions.rollout import Rollout
from rayclip.serve.versions.routing_table import Phase, ReplicaReport, RoutingTable, VersionSource
from rayclip.tracking.model_uri import is_registered
from rayclip.tracking.registry import ModelSource, Version, fetch, find_version, resolve_model

_logger = logging.getLogger("ray.serve")
# A busy replica may be late with its word; a dead one must not hold a swap up for long.
_FRESH_POLLS = 5
_LEAST_FRESH_S = 10
_RETRY_FETCH_S = 15


class _NotFetched(NamedTuple):
    """A version that a role is to have and whose files could not be had."""

    version: str
    why: str
    retry_at: float


class Coordinator:
    """Small and replaceable: where it dies, the others go on with what it said last, and a new one asks MLflow."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        self._config = config
        self._roles = {"champion": config.model} | ({"canary": config.canary} if config.canary else {})
        shares = {"champion": 1.0 - config.canary_share, "canary": config.canary_share}
        self._rollout = Rollout(shares, max(_LEAST_FRESH_S, _FRESH_POLLS * config.poll_s), config.retire_s)
        self._started = int(time.time())
        self._metrics = CoordinatorMetrics()
        self._problems: dict[str, str] = {}
        self._found_at: dict[str, float] = {}
        self._not_fetched: dict[str, _NotFetched] = {}
        self._templates: dict[str, str | list[str]] = {}
        self._phase: Phase = "serving"
        self._closed_at = 0.0
        self._label_sets = _read_label_sets(config)
        for role, uri in self._roles.items():
            await self._look(role, uri)
        self._watching = asyncio.create_task(self._watch())

    async def report(self, report: ReplicaReport) -> RoutingTable:
        """Take a replica's report; return the versions that it is to load and to route to."""
        self._rollout.hear(report, time.monotonic())
        self._advance()
        return self._table()

    async def models(self) -> ModelsResponse:
        """Every version that is loaded, being loaded or could not be, and what is wrong with the registry."""
        table = self._rollout.table()
        models = [self._describe(version, table.traffic.get(version, 0.0)) for version in table.sources]
        models += [
            ServedModel(id=version, created=self._started, share=0.0, state="failed", error=why)
            for version, why in self._failures().items()
            if version not in table.sources
        ]
        return ModelsResponse(data=models, warnings=self._notices() or None)

    async def problems(self) -> list[str]:
        """What is wrong with the versions or the registry now, a line each."""
        failures = [f"{version} cannot be served: {why}" for version, why in self._failures().items()]
        return [notice.message for notice in self._notices()] + failures

    async def metrics(self) -> bytes:
        """All replicas' figures in Prometheus' text form."""
        now = time.monotonic()
        for role, found_at in self._found_at.items():
            self._metrics.up.labels(role).set(role not in self._problems)
            self._metrics.age.labels(role).set(now - found_at)
        self._metrics.failed.clear()
        for version in self._failures():
            self._metrics.failed.labels(version).set(1)
        figures = {report.replica: report.metrics for report in self._rollout.reports()}
        return render({"coordinator": collect(self._metrics.registry), **figures})

    async def enter(self, phase: Phase) -> None:
        """Tell all replicas, as they report, that the service is about to stop."""
        self._phase, self._closed_at = phase, time.monotonic()

    async def is_idle(self) -> bool:
        """Whether every ingress has said, since the phase began, that it answers nothing."""
        # The report that was on its way when the phase began does not count.
        return self._rollout.is_idle(self._closed_at + self._config.poll_s)

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
                    await self._look_again(role, uri)
            self._advance()

    async def _look_again(self, role: str, uri: str) -> None:
        """Follow the registry. What is wrong with it is told and changes nothing: what is loaded goes on serving."""
        try:
            await self._look(role, uri)
            if self._problems.pop(role, None):
                _logger.info("%s: %s is followed again", role, uri)
        except UserError as error:
            self._tell(role, str(error))
        except Exception as error:  # whatever a database raises: it must not end the watching
            self._tell(role, f"{uri} cannot be followed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def _tell(self, role: str, why: str) -> None:
        if self._problems.get(role) != why:
            self._problems[role] = why
            _logger.error("%s stays as it is: %s", role, why)

    async def _look(self, role: str, uri: str) -> None:
        """Ask what the role's URI stands for now, and fetch that where it is new. Raises UserError."""
        tracking_uri = self._config.tracking_uri
        if not is_registered(uri):
            source = await asyncio.to_thread(resolve_model, uri, tracking_uri)
        else:
            version = await asyncio.to_thread(find_version, uri, tracking_uri)
            self._found_at[role] = time.monotonic()
            if str(version) == self._rollout.wanted(role):
                self._not_fetched.pop(role, None)
                return
            source = await self._fetch(role, version)
            uri = f"models:/{version}"
        self._templates[source.version] = await asyncio.to_thread(read_templates, source.folder)
        self._rollout.want(role, source.version, VersionSource(uri, str(source.folder)))

    async def _fetch(self, role: str, version: Version) -> ModelSource:
        """A version's files, tried again now and then where they could not be had. Raises UserError."""
        before = self._not_fetched.pop(role, None)
        if before and before.version == str(version) and time.monotonic() < before.retry_at:
            self._not_fetched[role] = before
            raise UserError(before.why)
        try:
            return await asyncio.to_thread(fetch, version, self._config.tracking_uri)
        except UserError as error:
            self._not_fetched[role] = _NotFetched(str(version), str(error), time.monotonic() + _RETRY_FETCH_S)
            raise

    def _advance(self) -> None:
        for role, old, new in self._rollout.advance(time.monotonic()):
            _logger.info("%s: %s takes over from %s", role, new, old)

    def _table(self) -> RoutingTable:
        table = self._rollout.table()
        templates = {version: found for version in table.sources if (found := self._templates.get(version))}
        return replace(table, templates=templates, loading=self._rollout.loading(), phase=self._phase)

    def _failures(self) -> dict[str, str]:
        """The versions that cannot be served, and why."""
        failed = {version: self._rollout.failure(version) for version in self._rollout.table().sources}
        not_fetched = {each.version: each.why for each in self._not_fetched.values()}
        return not_fetched | {version: why for version, why in failed.items() if why}

    def _notices(self) -> list[Notice]:
        return [
            Notice(code="registry_not_followed", message=f"{role} stays as it is: {why}", params=[role])
            for role, why in self._problems.items()
        ]

    def _describe(self, version: str, share: float) -> ServedModel:
        info = self._rollout.info(version)
        return ServedModel(
            id=version,
            created=self._started,
            share=share,
            state=self._rollout.state(version),
            error=self._rollout.failure(version),
            **(asdict(info) if info else {}),
        )


def read_templates(folder: Path) -> str | list[str]:
    """The templates that a checkpoint's training measured zero-shot with; empty where it has not, or nobody knows."""
    try:
        settings = json.loads((folder / "config.json").read_text())
        tasks = settings["evaluation"]["tasks"].values()
        return next((task["templates"] for task in tasks if task["kind"] == "zero_shot"), [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # exported weights have none
        return []


def _read_label_sets(config: ServeConfig) -> dict[str, LabelSetInfo]:
    sets = {
        name: LabelSetInfo.model_validate({"name": name, **each.model_dump()})
        for name, each in config.label_sets.items()
    }
    for path in matching(storage_path(config.state_folder), "label_sets/*.json") if config.state_folder else ():
        kept = LabelSetInfo.model_validate_json(path.read_text())
        sets[kept.name] = kept
    return sets


def _label_set_path(state_folder: str, name: str) -> StoragePath:
    return storage_path(state_folder) / "label_sets" / f"{quote(name, safe='')}.json"
