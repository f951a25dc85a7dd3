"""Which version takes which share of the traffic, and when: a new one takes over once every replica has it loaded.

No Ray and no clock of its own in here: the coordinator feeds it with what the registry and the replicas say.
"""

from dataclasses import dataclass
from typing import Literal

from rayclip.serve.versions.routing_table import ModelInfo, ReplicaReport, RoutingTable, VersionSource

_TOWERS = ("image", "text")


@dataclass
class _Seen:
    report: ReplicaReport
    at: float


class Rollout:
    """Roles ("champion", and where there is one "canary") and the versions that fill them.

    Of a role two versions may be known: the one that is wanted and the one that is active. They differ from the
    moment an alias moves until every replica that has been heard of lately says that it has the new one. A version that
    cannot be loaded never becomes active. One that was replaced stays loaded for `retire_s`: requests may still name
    it.
    """

    def __init__(self, shares: dict[str, float], fresh_s: float, retire_s: float) -> None:
        self._shares = shares
        self._fresh_s = fresh_s
        self._retire_s = retire_s
        self._wanted: dict[str, str] = {}
        self._active: dict[str, str] = {}
        self._sources: dict[str, VersionSource] = {}
        self._retired_at: dict[str, float] = {}
        self._seen: dict[str, _Seen] = {}

    def want(self, role: str, version: str, source: VersionSource) -> None:
        """A role is to be filled by a version. The first is active at once: there is nothing to hold on to."""
        self._wanted[role] = version
        self._sources[version] = source
        self._active.setdefault(role, version)

    def wanted(self, role: str) -> str | None:
        """The version that is to fill the role."""
        return self._wanted.get(role)

    def hear(self, report: ReplicaReport, now: float) -> None:
        """Take a replica's report."""
        self._seen[report.replica] = _Seen(report, now)

    def advance(self, now: float) -> list[tuple[str, str, str]]:
        """Swap what can be swapped and forget what is over. Returns (role, from, to) of every swap."""
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen.at < self._fresh_s}
        swaps = []
        for role, wanted in self._wanted.items():
            active = self._active[role]
            if active != wanted and self._everywhere(wanted):
                self._active[role] = wanted
                swaps.append((role, active, wanted))
                self._retired_at[active] = now
        kept = {*self._wanted.values(), *self._active.values()}
        for version in kept:
            self._retired_at.pop(version, None)
        for version in [v for v in self._sources if v not in kept]:
            # A version that was wanted and never active has no moment of its own.
            if now - self._retired_at.setdefault(version, now) >= self._retire_s:
                del self._sources[version], self._retired_at[version]
        return swaps

    def table(self) -> RoutingTable:
        """What replicas go by. Roles filled by one version add up."""
        traffic: dict[str, float] = {}
        for role, version in self._active.items():
            traffic[version] = traffic.get(version, 0.0) + self._shares[role]
        return RoutingTable(traffic, dict(self._sources))

    def loading(self) -> tuple[str, ...]:
        """The towers of which no replica has every version that takes traffic."""
        wanted = set(self._active.values())
        ready = {seen.report.kind for seen in self._seen.values() if wanted <= seen.report.loaded.keys()}
        return tuple(tower for tower in _TOWERS if tower not in ready)

    def is_idle(self, since: float) -> bool:
        """Whether every ingress has said, later than `since`, that it answers nothing."""
        seen = [seen for seen in self._seen.values() if seen.report.kind == "ingress"]
        return all(each.at > since and each.report.running == 0 for each in seen)

    def state(self, version: str) -> Literal["serving", "loading", "retiring", "failed"]:
        """serving, loading, failed or retiring."""
        if version in self._active.values():
            return "serving"
        if version not in self._wanted.values():
            return "retiring"
        return "failed" if self.failure(version) else "loading"

    def failure(self, version: str) -> str | None:
        """Why a replica could not load the version."""
        return next((s.report.failed[version] for s in self._seen.values() if version in s.report.failed), None)

    def info(self, version: str) -> ModelInfo | None:
        """What the version is like, once a replica has it."""
        return next((s.report.loaded[version] for s in self._seen.values() if version in s.report.loaded), None)

    def reports(self) -> list[ReplicaReport]:
        """What the replicas said last."""
        return [seen.report for seen in self._seen.values()]

    def _everywhere(self, version: str) -> bool:
        for tower in _TOWERS:
            replicas = [seen.report for seen in self._seen.values() if seen.report.kind == tower]
            if not replicas or not all(version in report.loaded for report in replicas):
                return False
        return True
