"""The jobs that Python callers run: the same code as the commands, with typed results."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rayclip.api.loading import find_model
from rayclip.config import EmbedConfig, SuiteConfig, TrainConfig
from rayclip.config.loader import load_from_python
from rayclip.errors import UserError
from rayclip.inference.model import Model
from rayclip.io.paths import matching, storage_path
from rayclip.io.s3 import StorageError
from rayclip.io.storage import join
from rayclip.orchestration.batch import embed as batch_embed
from rayclip.orchestration.batch import evaluate as batch_evaluate
from rayclip.orchestration.cluster.progress import progress_shown
from rayclip.orchestration.train.driver import run_training
from rayclip.orchestration.train.run_folder import RunFolder

ModelLike: TypeAlias = Model | str | os.PathLike[str]
"""A loaded model, or what `rayclip.load` takes."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to."""

    name: str
    """The run's name."""
    folder: str
    """The run's folder, on disk or in S3."""
    checkpoint: str
    """The best checkpoint's folder, which `rayclip.load` takes."""
    model: str | None
    """The registered version, models:/NAME/NUMBER; None where the run registers none."""
    metrics: dict[str, float]
    """What was measured at the best checkpoint, by TASK.METRIC."""
    samples_seen: int
    """Samples that the last weights have seen."""
    samples_per_s: float
    """Samples a second, over all workers."""
    mlflow_run_id: str
    """The run in MLflow."""
    summary: dict[str, Any] = field(repr=False)
    """All of it, as summary.json has it."""


@dataclass(frozen=True)
class EvaluationResult:
    """What a model's evaluation on a suite came to."""

    suite: str
    """The suite's name."""
    model_version: str
    """The version that was measured."""
    scores: dict[str, float]
    """The figure of each data set, by its metric, between 0 and 1."""
    not_there: dict[str, str]
    """The data sets that are not there, and why."""
    folder: str
    """The folder of the report."""
    report: str
    """The report as a page, report.html."""
    summary: dict[str, Any] = field(repr=False)
    """All of it, as summary.json has it: intervals, each task's figures."""


@dataclass(frozen=True)
class EmbedResult:
    """What the embedding of a data set came to."""

    output: str
    """The folder that was written."""
    parts: list[str] = field(repr=False)
    """Its Parquet files, which hold a row a sample, in the data set's order."""
    model_version: str
    """The version that embedded."""
    samples: int
    """Samples, a row each."""
    images: int
    """Images that were embedded."""
    texts: int
    """Captions that were embedded."""
    errors: dict[str, int]
    """Samples that could not be read, by cause."""
    summary: dict[str, Any] = field(repr=False)
    """All of it, as summary.json has it."""


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig, *, progress: bool = False, **overrides: Any
) -> TrainResult:
    """Train a model, evaluate it, and register its best checkpoint. The same call goes on with an interrupted run.

    Ray is started in this process where it is not; `RAY_ADDRESS` names a cluster to join.

    Args:
        config: a recipe, a YAML file, a mapping of settings, or a `TrainConfig`.
        progress: whether to show a line of progress on stderr.
        **overrides: settings in place of the config's: `name="mine"`, `data={"path": "data/mine"}`, which is merged
            with the config's section, or `**{"data.path": "data/mine"}`.

    Raises:
        UserError: a setting, the data or the cluster is not as it must be, or the workers died too often.
    """
    settings = load_from_python(TrainConfig, config, overrides)
    with _as_library(progress):
        summary = run_training(settings)
    version = summary["model_version"]
    tasks = {**summary.get("zero_shot", {}), **summary.get("retrieval", {})}
    return TrainResult(
        name=summary["name"],
        folder=str(RunFolder(storage_path(settings.runs) / settings.name).path),
        checkpoint=summary["checkpoint"],
        model=None if version is None else f"models:/{summary['registered_model']}/{version}",
        metrics={
            f"{task}.{name}": value
            for task, figures in tasks.items()
            for name, value in figures.items()
            if isinstance(value, int | float)
        },
        samples_seen=summary["samples_seen"],
        samples_per_s=summary["samples_per_s"],
        mlflow_run_id=summary["mlflow_run_id"],
        summary=summary,
    )


def evaluate(
    model: ModelLike,
    suite: str | os.PathLike[str] | Mapping[str, Any] | SuiteConfig,
    *,
    progress: bool = False,
    **overrides: Any,
) -> EvaluationResult:
    """Measure a model on the data sets of a suite, and write the report.

    Args:
        model: a loaded model, or what `rayclip.load` takes.
        suite: a recipe, a YAML file, a mapping of settings, or a `SuiteConfig`.
        progress: whether to show a line of progress on stderr.
        **overrides: settings in place of the suite's, as with `train`.

    Raises:
        UserError: a setting, the model or a data set is not as it must be.
    """
    if isinstance(suite, SuiteConfig):
        suite = suite.model_dump(exclude_unset=True)
    settings = _with_model(SuiteConfig, suite, model, overrides)
    with _as_library(progress):
        summary = batch_evaluate.evaluate(settings)
    return EvaluationResult(
        suite=summary["suite"],
        model_version=summary["model_version"],
        scores={name: result["score"]["value"] for name, result in summary["datasets"].items()},
        not_there=summary["not_there"],
        folder=summary["output"],
        report=join(summary["output"], "report.html"),
        summary=summary,
    )


def embed(
    model: ModelLike,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    progress: bool = False,
    **overrides: Any,
) -> EmbedResult:
    """Write the features of a data set's images and captions to Parquet. The same call goes on after a crash.

    Args:
        model: a loaded model, or what `rayclip.load` takes.
        data: the data set's folder.
        output: the folder that is written.
        progress: whether to show a line of progress on stderr.
        **overrides: other settings of `rayclip embed`, as `what="pictures"` or `cluster={"num_workers": 4}`.

    Raises:
        UserError: a setting, the model or the data is not as it must be, or too many samples cannot be read.
    """
    values = {"data": os.fspath(data), "output": os.fspath(output), **overrides}
    settings = _with_model(EmbedConfig, None, model, values)
    with _as_library(progress):
        summary = batch_embed.embed(settings)
    return EmbedResult(
        output=summary["output"],
        parts=[str(part) for part in matching(storage_path(summary["output"]), "part-*.parquet")],
        model_version=summary["model_version"],
        samples=summary["samples"],
        images=summary["pictures"],
        texts=summary["texts"],
        errors=summary["causes"],
        summary=summary,
    )


def _with_model(schema: type[Any], base: Any, model: ModelLike, overrides: Mapping[str, Any]) -> Any:
    if isinstance(model, Model):
        values = {"model": model.uri} | ({"tracking_uri": model.tracking_uri} if model.tracking_uri else {})
    else:
        values = {"model": find_model(os.fspath(model), overrides.get("tracking_uri"))}
    return load_from_python(schema, base, {**values, **overrides})


@contextmanager
def _as_library(progress: bool) -> Iterator[None]:
    """Show progress where it is wanted, and raise a UserError where storage cannot be read or written."""
    with progress_shown(progress):
        try:
            yield
        except StorageError as error:
            raise UserError(str(error)) from None
