"""MLflow: one run per training run, whatever restarts happen.

The driver opens the run and hands its id over; the first worker logs to it. A worker that starts anew repeats steps
that a crash rolled back: those are in the run already and are not logged twice.
"""

import http.client
import json
import logging
import math
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from rayclip.errors import UserError, first_line
from rayclip.io.storage import is_remote, join
from rayclip.tracking.names import STEP_METRIC, flatten

_SERVER_TIMEOUT_S = 5
_MOST_DIGEST = 36  # letters that MLflow takes


def resolve_uri(uri: str | None) -> str:
    """The tracking URI: as given, or the embedded database under ./mlflow, as an absolute path."""
    if uri is not None:
        return uri
    return f"sqlite:///{Path('mlflow/mlflow.db').absolute()}"


def connect(uri: str) -> MlflowClient:
    """A client, once something answers there. Raises UserError where nothing does."""
    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SERVER_TIMEOUT_S).close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split())
            raise UserError(f"no MLflow server answers at {uri}: {reason}") from None
    mlflow.set_tracking_uri(uri)
    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):  # of two that make its tables at once, one fails
        return MlflowClient(uri)


def connect_existing(uri: str) -> MlflowClient:
    """A client for looking things up: it makes no database where there is none. Raises UserError where none can be."""
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():
        raise UserError(f"no MLflow database at '{database}': train a model first, or give tracking_uri")
    try:
        return connect(uri)
    except UserError:
        raise
    except Exception as error:  # what a store raises depends on its kind: a database's own errors among them
        raise UserError(f"MLflow cannot be read at {uri}: {first_line(error)}") from None


def open_run(
    uri: str,
    experiment: str,
    name: str,
    config: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None,
    parent_run_id: str | None = None,
    artifacts: str | None = None,
) -> str:
    """The id of the training run's MLflow run: `run_id` where that exists, else a new one with its config as params,
    nested in the parent where one is given. A new experiment keeps its files below `artifacts`.
    """
    client = connect(uri)
    if run_id is not None:
        try:
            client.set_terminated(run_id, "RUNNING")
            return run_id
        except MlflowException:
            raise UserError(f"the run's MLflow run {run_id} is not in {uri}: was its database moved?") from None
    nesting = {MLFLOW_PARENT_RUN_ID: parent_run_id} if parent_run_id else {}
    run = client.create_run(_experiment_id(client, uri, experiment, artifacts), run_name=name, tags=nesting)
    params = [Param(key, json.dumps(value)[:6000]) for key, value in flatten(config).items()]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.log_dict(run.info.run_id, dict(config), "config.json")
    return run.info.run_id


class DataSetInput(NamedTuple):
    """A data set that a run reads, for the list of them on its page."""

    path: str
    digest: str
    context: Literal["training", "evaluation"]
    num_samples: int


def fill_run(uri: str, run_id: str, description: str, data_sets: Sequence[DataSetInput]) -> None:
    """Fill in the run's description, in Markdown, and its data sets, of which MLflow keeps one of each digest."""
    inputs = [
        DatasetInput(
            Dataset(
                name=PurePath(found.path).name,
                digest=found.digest[:_MOST_DIGEST],
                source_type=found.path.partition("://")[0] if is_remote(found.path) else "local",
                source=json.dumps({"uri": found.path}),
                profile=json.dumps({"num_samples": found.num_samples}),
            ),
            [InputTag(MLFLOW_DATASET_CONTEXT, found.context)],
        )
        for found in data_sets
    ]
    client = MlflowClient(uri)
    client.set_tag(run_id, MLFLOW_RUN_NOTE, description)
    client.log_inputs(run_id, datasets=inputs)


def run_address(uri: str, run_id: str) -> str:
    """Return where people find a run: its page on a server, or the command that opens a database on this machine."""
    if not uri.startswith(("http://", "https://")):
        return f"{run_id} in {uri.removeprefix('sqlite:///')}, which `rayclip ui` opens"
    experiment = MlflowClient(uri).get_run(run_id).info.experiment_id
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def close_run(uri: str, run_id: str, succeeded: bool, stopped: bool = False) -> None:
    """Say that the run has ended: by itself, or stopped because others are better."""
    MlflowClient(uri).set_terminated(run_id, "KILLED" if stopped else "FINISHED" if succeeded else "FAILED")


def log_once(
    client: MlflowClient, run_id: str, metrics: Mapping[str, float], step: int, model_id: str | None = None
) -> None:
    """Numbers at a step, of a logged model where one is given; what the run has at that step already is left out."""
    for key, value in metrics.items():
        if all(point.step != step for point in client.get_metric_history(run_id, key)):
            client.log_metric(run_id, key, value, step=step, model_id=model_id)


def log_constants(client: MlflowClient, run_id: str, values: Mapping[str, float]) -> None:
    """Keep numbers that do not change over a run as its params. One that a run has already stays as it is."""
    there = client.get_run(run_id).data.params
    params = [Param(key, json.dumps(value)) for key, value in values.items() if key not in there]
    if params:
        client.log_batch(run_id, params=params)


def log_image(client: MlflowClient, run_id: str, path: Path) -> None:
    """Keep a file with the run, under `images/`."""
    client.log_artifact(run_id, str(path), "pictures")


class _Monitor(SystemMetricsMonitor):
    """Logs how busy the machine is, from a thread of its own."""

    def __init__(self, check: Callable[[], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check = check

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        try:
            self._check()
        except (UserError, OSError):  # who trains is told, not this thread
            return
        super().publish_metrics(metrics)


class MlflowTracker:
    """Logs to an open run from one process. A server that does not answer delays points, it does not stop a run.

    `check` raises where the run is not this process's any more; nothing is logged then.
    """

    def __init__(self, uri: str, run_id: str, check: Callable[[], None] = lambda: None) -> None:
        self._client = connect(uri)
        self._run_id, self._check = run_id, check
        history = self._client.get_metric_history(run_id, STEP_METRIC)
        self._last_step: dict[str, int] = {STEP_METRIC: max((point.step for point in history), default=-1)}
        self._unsent: list[Metric] = []
        self._monitor = _Monitor(check, run_id, sampling_interval=5, resume_logging=bool(history))
        self._monitor.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step (samples seen). What the run has from that step on already is left out."""
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if step > self._last(key) and math.isfinite(value):
                self._unsent.append(Metric(key, float(value), now, step))
                self._last_step[key] = step
        try:
            self._check()
            self._client.log_batch(self._run_id, metrics=self._unsent[:1000])
        except (MlflowException, OSError) as error:
            logging.getLogger(__name__).warning("MLflow did not take a point, trying again with the next: %s", error)
        else:
            self._unsent = self._unsent[1000:]

    def log_constants(self, values: Mapping[str, float]) -> None:
        """Keep numbers that do not change over a run as its params."""
        try:
            log_constants(self._client, self._run_id, values)
        except MlflowException as error:
            logging.getLogger(__name__).warning("MLflow did not take %s: %s", ", ".join(values), error)

    def log_image(self, path: Path) -> None:
        """Keep a file with the run, under `images/`."""
        log_image(self._client, self._run_id, path)

    def close(self) -> None:
        """Send what is left, and stop watching the machine; nothing is sent where `check` raises."""
        with suppress(OSError):
            self._check()
        unsent = len(self._unsent) + 1
        while self._unsent and len(self._unsent) < unsent:  # a request takes 1,000 points
            unsent = len(self._unsent)
            self.log({}, 0)
        self._monitor.finish()

    def _last(self, key: str) -> int:
        if key not in self._last_step:
            history = self._client.get_metric_history(self._run_id, key)
            self._last_step[key] = max((point.step for point in history), default=-1)
        return self._last_step[key]


def _experiment_id(client: MlflowClient, uri: str, name: str, artifacts: str | None) -> str:
    location = artifacts and _location(artifacts, name)
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        there = experiment.artifact_location
        if location is not None and there != location:
            raise UserError(f"experiment '{name}' keeps its files at '{there}', not at '{location}': name another one")
        return experiment.experiment_id
    if location is None and uri.startswith("sqlite:///"):
        location = _location(str(Path(uri.removeprefix("sqlite:///")).parent / "artifacts"), name)
    return client.create_experiment(name, artifact_location=location)


def _location(artifacts: str, name: str) -> str:
    return join(artifacts, name) if is_remote(artifacts) else (Path(artifacts).absolute() / name).as_uri()
