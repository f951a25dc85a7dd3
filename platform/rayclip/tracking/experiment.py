"""A whole experiment of MLflow: its training runs read back, and what was made of them put beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from rayclip.errors import UserError, nearest
from rayclip.tracking.mlflow import close_run, connect, open_run, resolve_uri

_KIND = "kind"
_PAGE = 1000


@dataclass(frozen=True)
class TrainingRun:
    """A run as it was logged: `settings` by dotted key, `metrics` with their last values."""

    id: str
    name: str
    status: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]


def read_runs(client: MlflowClient, experiment: str) -> list[TrainingRun]:
    """The training runs of an experiment, the oldest first. Raises UserError where there is no such experiment."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = [known.name for known in client.search_experiments()]
        raise UserError(f"no experiment '{experiment}' in {client.tracking_uri}: {nearest(experiment, names)}")
    runs, token = [], None
    while True:
        page = client.search_runs(
            [found.experiment_id], max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += [run for run in page if _KIND not in run.data.tags]
        token = page.token
        if not token:
            break
    return [
        TrainingRun(
            run.info.run_id, run.info.run_name, run.info.status, _values(run.data.params), dict(run.data.metrics)
        )
        for run in runs
    ]


def last_point(client: MlflowClient, run_id: str, metric: str) -> tuple[int, float]:
    """The step (samples seen) at which a run's metric was measured last, and its value there."""
    history = client.get_metric_history(run_id, metric)
    last = max(history, key=lambda point: (point.step, point.timestamp))
    return last.step, last.value


def log_result(
    uri: str | None,
    experiment: str,
    kind: str,
    name: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    files: list[Path],
) -> str:
    """A run of its own for what was made of others, which `read_runs` leaves out; returns its id."""
    uri = resolve_uri(uri)
    run_id = open_run(uri, experiment, name, settings, {_KIND: kind}, None)
    client = connect(uri)
    client.log_batch(run_id, metrics=[Metric(key, value, 0, 0) for key, value in metrics.items()])
    for file in files:
        client.log_artifact(run_id, str(file))
    close_run(uri, run_id, succeeded=True)
    return run_id


def _values(params: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in params.items():
        try:
            values[key] = json.loads(text)
        except ValueError:  # cut off where it was too long, or logged by somebody else
            values[key] = text
    return values
