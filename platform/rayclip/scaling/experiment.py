"""The runs that a law is fitted to, from an MLflow experiment of training runs."""

from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from pydantic import ValidationError

from rayclip.config import ModelConfig
from rayclip.errors import UserError
from rayclip.scaling.flops import forward_gmacs
from rayclip.scaling.points import Run, make_run
from rayclip.tracking.experiment import TrainingRun, last_point, read_runs
from rayclip.tracking.mlflow import connect_existing, resolve_uri

_PREFIX = "evaluation/"
_USUAL = (".top1", ".image_to_text.recall_at_1")
"""Metrics whose complement is the error where none is named, the first kind that there is."""


def read_experiment(uri: str | None, experiment: str, metric: str | None = None) -> list[Run]:
    """The runs of an experiment: GMACs of their model at full context, samples seen when they were measured last, and
    one minus the metric there.

    Raises UserError where the experiment is not there, and where the metric is not, or several could be meant.
    """
    client = connect_existing(resolve_uri(uri))
    runs = read_runs(client, experiment)
    named = {name for run in runs for name in run.metrics if name.startswith(_PREFIX)}
    measured = sorted(name.removeprefix(_PREFIX) for name in named)
    metric = metric or _usual_metric(measured, experiment)
    if metric not in measured:
        raise UserError(f"no run of '{experiment}' has measured '{metric}'; {_list_metrics(measured)}")
    return [_read_run(client, run, metric) for run in runs]


def _usual_metric(measured: list[str], experiment: str) -> str:
    for ending in _USUAL:
        found = [name for name in measured if name.endswith(ending) and ".ema." not in name]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"'{experiment}' has several measurements: give metric={' or metric='.join(found)}")
    raise UserError(f"no run of '{experiment}' has measured top1 or recall_at_1; {_list_metrics(measured)}")


def _list_metrics(measured: list[str]) -> str:
    return f"measured: {', '.join(measured) or 'nothing'}"


def _read_run(client: MlflowClient, run: TrainingRun, metric: str) -> Run:
    if run.status != "FINISHED":
        return Run(run.name, None, f"its status is {run.status}, not FINISHED")
    if _PREFIX + metric not in run.metrics:
        return Run(run.name, None, f"it has not measured {metric}")
    if run.settings.get("weights") is not None:
        return Run(run.name, None, f"it began with weights that had seen samples before: {run.settings['weights']}")
    try:
        gmacs = forward_gmacs(ModelConfig.model_validate(_nested(run.settings, "model")))
    except ValidationError as error:
        return Run(run.name, None, f"its model cannot be read: {error.errors()[0]['msg']}")
    samples, value = last_point(client, run.id, _PREFIX + metric)
    return make_run(run.name, {"gmacs": gmacs, "samples": samples, "error": 1 - value})


def _nested(settings: Mapping[str, Any], under: str) -> dict[str, Any]:
    """{"model.text.width": 8} as {"text": {"width": 8}}."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        first, *path = key.split(".")
        if first == under and path:
            inner = nested
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value
    return nested
