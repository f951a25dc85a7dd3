"""A whole experiment of MLflow: its training runs read back, and what was made of them put beside them."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from rayclip.errors import UserError, nearest
from rayclip.io.paths import StoragePath, local_copy
from rayclip.tracking.mlflow import close_run, connect, open_run, resolve_uri

KIND = "kind"
"""Tag of the runs that are no training, and which `read_runs` leaves out."""
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
        runs += [run for run in page if KIND not in run.data.tags]
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
    files: list[StoragePath],
) -> str:
    """A run of its own for what was made of others, which `read_runs` leaves out; returns its id."""
    uri = resolve_uri(uri)
    run_id = open_run(uri, experiment, name, settings, {KIND: kind}, None)
    log_files(uri, run_id, metrics, files)
    close_run(uri, run_id, succeeded=True)
    return run_id


def log_files(uri: str, run_id: str, metrics: Mapping[str, float], files: list[StoragePath]) -> None:
    """Keep numbers and files with a run; what is there already is replaced."""
    client = connect(uri)
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])
    for file in files:
        with local_copy(file) as local:
            client.log_artifact(run_id, str(local))


def mean_of_last(client: MlflowClient, run_id: str, metric: str, share: float) -> float | None:
    """A metric's mean over the last share of a run's steps (samples seen); None where it has no point."""
    history = client.get_metric_history(run_id, metric)
    if not history:
        return None
    since = (1 - share) * max(point.step for point in history)
    values = [point.value for point in history if point.step >= since]
    return sum(values) / len(values)


def _values(params: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in params.items():
        try:
            values[key] = json.loads(text)
        except ValueError:  # cut off where it was too long, or logged by somebody else
            values[key] = text
    return values
