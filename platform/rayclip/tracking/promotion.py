"""Whether a new version takes an alias: for a reason, which is kept with its figures on the version.

What a version measured is on it as a tag: each task's metrics with a digest of the data they were measured on. A
version is compared with the one that has the alias on the same metric of the same data, or not at all.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mlflow import MlflowClient

from rayclip.config import TrackingConfig
from rayclip.tracking.names import flatten
from rayclip.tracking.registry import move_alias

MEASURED_TAG, DECISION_TAG = "measured", "promotion"
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Measured:
    """What a model gave on one task, and on what data: only equal digests can be compared."""

    digest: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Decision:
    """Whether the alias was moved, why, and by which figures: the metric's value of both versions, and the gate's."""

    alias: str
    outcome: Literal["promoted", "not promoted"]
    reason: str
    version: int
    against: int | None = None
    metric: str | None = None
    value: float | None = None
    value_against: float | None = None
    gate: "list[GateResult]" = field(default_factory=list)


@dataclass(frozen=True)
class GateResult:
    """How much a metric changed, with the 95% interval, and how much it may fall at most."""

    metric: str
    change: float
    low: float
    high: float
    max_loss: float

    @property
    def passed(self) -> bool:
        """Whether even the interval's low end stays above what is allowed."""
        return self.low >= -self.max_loss


def promote(
    client: MlflowClient,
    config: TrackingConfig,
    version: int,
    measured: Mapping[str, Measured],
    metric: str | None,
) -> Decision:
    """Decide whether a registered version takes the alias, move it if so, and keep the decision as tags of the version.

    `metric` is TASK.METRIC, as `measured` has it; None where the run measured nothing.
    """
    assert config.register_as
    name = config.register_as
    plain = {task: asdict(entry) for task, entry in measured.items()}
    client.set_model_version_tag(name, str(version), MEASURED_TAG, json.dumps(plain))
    decision = _decide(client, config, version, measured, metric)
    # First the reason, then the alias: who sees it moved can read why.
    client.set_model_version_tag(name, str(version), DECISION_TAG, decision.outcome)
    for key, value in asdict(decision).items():
        if key != "outcome" and value not in (None, []):
            text = json.dumps(value) if isinstance(value, list) else str(value)
            client.set_model_version_tag(name, str(version), f"{DECISION_TAG}.{key}", text)
    if decision.outcome == "promoted":
        move_alias(client, name, config.alias, version)
    return decision


def _decide(
    client: MlflowClient, config: TrackingConfig, version: int, measured: Mapping[str, Measured], metric: str | None
) -> Decision:
    name, alias = config.register_as or "", config.alias
    kept = client.get_registered_model(name).aliases.get(alias)
    against = int(kept) if kept is not None else None

    def decision(promoted: bool, reason: str, **figures: Any) -> Decision:
        return Decision(alias, "promoted" if promoted else "not promoted", reason, version, against, **figures)

    if config.promote == "never":
        return decision(False, "tracking.promote is never")
    if against is None:
        return decision(True, f"it is the first '{alias}'", metric=metric, value=_value(measured, metric))
    if against == version:
        return decision(True, f"it is '{alias}' already", metric=metric, value=_value(measured, metric))
    if config.promote == "always":
        return decision(True, "tracking.promote is always", metric=metric, value=_value(measured, metric))
    if metric is None:
        return decision(False, "nothing was measured that versions could be compared by")
    others = _measured_of(client, name, against)
    why_not = _cannot_compare(metric, measured, others, against)
    if why_not:
        return decision(False, why_not, metric=metric, value=_value(measured, metric))
    value, other = _value(measured, metric), _value(others, metric)
    assert value is not None and other is not None
    figures: dict[str, Any] = {"metric": metric, "value": value, "value_against": other}
    if not value > other:
        word = "equal to" if value == other else "worse than"
        return decision(False, f"{metric} {value:.1%} is {word} version {against}'s {other:.1%}", **figures)
    gate = []
    for gated, max_loss in config.gate.items():
        why_not = _cannot_compare(gated, measured, others, against)
        if why_not:
            return decision(False, f"gate: {why_not}", **figures)
        gate.append(_gate(gated, measured, others, max_loss))
    figures["gate"] = gate
    failed = [result for result in gate if not result.passed]
    if failed:
        told = "; ".join(
            f"{result.metric} changes by {result.change:+.1%} [{result.low:+.1%}, {result.high:+.1%}], "
            f"and may lose at most {result.max_loss:.1%}"
            for result in failed
        )
        return decision(False, f"gate: {told}", **figures)
    return decision(True, f"{metric} {value:.1%} is better than version {against}'s {other:.1%}", **figures)


def _cannot_compare(
    metric: str, measured: Mapping[str, Measured], others: Mapping[str, Measured], against: int
) -> str | None:
    task = metric.partition(".")[0]
    if _value(measured, metric) is None:
        return f"{metric} was not measured"
    if _value(others, metric) is None:
        return f"version {against} has no record of {metric}"
    if measured[task].digest != others[task].digest:
        return f"{metric} was measured on other data than version {against}'s"
    return None


def _gate(metric: str, measured: Mapping[str, Measured], others: Mapping[str, Measured], max_loss: float) -> GateResult:
    value, other = _value(measured, metric), _value(others, metric)
    assert value is not None and other is not None
    task, _, key = metric.partition(".")
    half = _NORMAL_95 * math.sqrt(
        sum(_variance(rate, side[task].metrics, key) for rate, side in ((value, measured), (other, others)))
    )
    return GateResult(metric, value - other, value - other - half, value - other + half, max_loss)


def _variance(rate: float, metrics: Mapping[str, Any], key: str) -> float:
    """Of a share of n samples, with two right and two wrong ones added (Agresti and Coull, 1998), so that none is 0.

    Answers of two models to the same samples go together, so that the difference of two varies less than this says.
    """
    num = metrics.get("num_samples") or metrics["num_texts" if key.startswith("text_to_image") else "num_images"]
    adjusted = (rate * num + 2) / (num + 4)
    return adjusted * (1 - adjusted) / (num + 4)


def _value(measured: Mapping[str, Measured], metric: str | None) -> float | None:
    if metric is None:
        return None
    task, _, key = metric.partition(".")
    value = flatten(measured[task].metrics).get(key) if task in measured else None
    return float(value) if isinstance(value, int | float) else None


def _measured_of(client: MlflowClient, name: str, version: int) -> dict[str, Measured]:
    """What a version's tag says; nothing for one that an earlier release registered."""
    tag = client.get_model_version(name, str(version)).tags.get(MEASURED_TAG)
    return {task: Measured(**entry) for task, entry in json.loads(tag).items()} if tag else {}
