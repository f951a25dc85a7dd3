"""Checkpoints as MLflow's logged models, and the best of them as a registered version with an alias."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.logged_model_status import LoggedModelStatus

from rayclip.tracking.mlflow import flatten

MODEL_FILES = ("model.safetensors", "config.json", "metrics.json")
"""What a served model needs of a checkpoint."""


def link_checkpoint(
    client: MlflowClient, run_id: str, checkpoint: Path, step: int, metrics: Mapping[str, Any]
) -> LoggedModel:
    """The logged model of a checkpoint: made where the run has none for that step. Only a pointer, no copy."""
    run = client.get_run(run_id)
    name = f"{run.info.run_name}-{step:012}"
    known = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"name = '{name}' AND source_run_id = '{run_id}'"
    )
    if known and known[0].status == LoggedModelStatus.READY:
        return known[0]
    # One that is not ready was being made when a crash came.
    model = (
        known[0]
        if known
        else client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=run_id,
            tags={"checkpoint": str(checkpoint), "samples_seen": str(step)},
            model_type="clip",
        )
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
    for key, value in flatten(metrics).items():
        client.log_metric(run_id, f"checkpoint/{key}", value, step=step, model_id=model.model_id)
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def register(client: MlflowClient, model: LoggedModel, checkpoint: Path, name: str, alias: str) -> int:
    """Make a checkpoint a version of the registered model `name`, move the alias to it, and return its number.

    The version holds a copy of its own, so that it outlives the run's checkpoints. A checkpoint that is a version
    already stays the one it is.
    """
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.source == f"models:/{model.model_id}":
            client.set_registered_model_alias(name, alias, version.version)
            return int(version.version)
    for file in MODEL_FILES:
        client.log_model_artifact(model.model_id, str(checkpoint / file))
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"models:/{model.model_id}"
    version = client.create_model_version(name, source, run_id=model.source_run_id, model_id=model.model_id)
    client.set_registered_model_alias(name, alias, version.version)
    return int(version.version)
