"""Asynchronous validation: a checkpoint is measured in a process of its own, while the workers go on.

Ray Train starts it when the checkpoint is in its list, one at a time and in their order; keeps the checkpoint for so
long; puts it in its place by the score that comes back; and, where the run was killed meanwhile, starts it again. The
process may die at any line: whatever is done twice is there once.
"""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import ray
import ray.train
import torch

from rayclip.errors import UserError
from rayclip.io.files import write_json
from rayclip.io.lease import LostError
from rayclip.io.paths import StoragePath, local_copy, staged, storage_path
from rayclip.orchestration.cluster.resources import validation_resources
from rayclip.orchestration.train.checkpoint_metrics import (
    checkpoint_metrics,
    constants,
    evaluate_model,
    format_metrics,
    mlflow_metrics,
    with_ema,
)
from rayclip.orchestration.train.run_context import RunContext
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.training.checkpoint import load_model, read_metrics
from rayclip.training.loop import Metrics

_ATTEMPTS = 3


class _TryAgainError(Exception):
    """What Ray starts a measurement again for."""


@dataclass(frozen=True)
class CheckpointValidation:
    """Measures checkpoints of a run; Ray Train calls it, in a process that has `validation_resources` to itself."""

    context: RunContext

    def __call__(self, checkpoint: ray.train.Checkpoint, samples_seen: int, is_kept: bool) -> dict[str, float]:
        """What the checkpoint's place among the others changes to: nothing, for one that is kept whatever it scores.

        Raises, after a line for people, where it cannot be measured; training goes on without.
        """
        folder = RunFolder(storage_path(self.context.folder)).checkpoints / PurePath(checkpoint.path).name
        attempt: Any = ray.get(self.context.status_actor.attempt.remote(samples_seen))
        try:
            if attempt > _ATTEMPTS:
                raise UserError(f"its process died {_ATTEMPTS} times")
            self.context.fence.check()
            score = self._validate(folder, samples_seen)
        except LostError:
            raise  # nothing is written for a run that is another's
        except Exception as error:
            if attempt < _ATTEMPTS and not isinstance(error, UserError):
                raise _TryAgainError from error
            reason = " ".join(str(error).split()) or type(error).__name__
            self._note(f"the checkpoint at {samples_seen:,} samples could not be measured: {reason}; training goes on")
            self.context.link_checkpoint(folder, samples_seen, {})
            raise
        return {} if is_kept else {"score": score}

    def _validate(self, folder: StoragePath, samples_seen: int) -> float:
        content = read_metrics(folder)
        if not content["measured"]:
            content = checkpoint_metrics(self.context.config, samples_seen, self._run_tasks(folder))
            self.context.fence.check()
            write_json(folder / "metrics.json", content)
        self._publish(folder, samples_seen, content["tasks"])
        return content["score"]

    def _run_tasks(self, folder: StoragePath) -> Metrics:
        config, bundle = self.context.config, validation_resources(self.context.config)
        torch.set_num_threads(max(1, int(bundle["CPU"])))
        device = "cuda" if "GPU" in bundle else "cpu"
        with (
            local_copy(folder) as copy,
            staged(RunFolder(storage_path(self.context.folder)).contact_sheets) as contact_sheets,
        ):
            metrics = evaluate_model(config, load_model(copy).to(device), contact_sheets)
            if config.ema is None:
                return metrics
            return with_ema(metrics, evaluate_model(config, load_model(copy, ema=True).to(device)))

    def _publish(self, folder: StoragePath, samples_seen: int, metrics: Metrics) -> None:
        # Workers import this module too, and start seconds earlier without MLflow.
        from rayclip.tracking.mlflow import connect, log_constants, log_image, log_once

        client, run_id = connect(self.context.tracking_uri), self.context.mlflow_run_id
        self.context.link_checkpoint(folder, samples_seen, metrics)
        log_once(client, run_id, mlflow_metrics(metrics), samples_seen)
        log_constants(client, run_id, constants(metrics))
        with local_copy(RunFolder(storage_path(self.context.folder)).contact_sheets) as contact_sheets:
            for image in contact_sheets.glob("*.png"):
                log_image(client, run_id, image)
        self._note(format_metrics(samples_seen, metrics))

    def _note(self, line: str) -> None:
        self.context.status_actor.note.remote(line)


def validation_config(context: RunContext) -> ray.train.ValidationConfig:
    """How Ray Train has checkpoints measured that workers report with `validation_task`."""
    bundle = validation_resources(context.config)
    resources: dict[str, Any] = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)}
    # A process that dies is started again without end: it counts its attempts itself, and says so before it gives up.
    retries: dict[str, Any] = {"max_retries": -1, "retry_exceptions": [_TryAgainError]}
    # It is called with what `validation_task` gives, and with nothing else.
    return ray.train.ValidationConfig(CheckpointValidation(context), ray_remote_kwargs=resources | retries)  # type: ignore[arg-type]


def validation_task(samples_seen: int, is_kept: bool) -> ray.train.ValidationTaskConfig:
    """What a worker reports a checkpoint with that is to be measured."""
    return ray.train.ValidationTaskConfig(fn_kwargs={"samples_seen": samples_seen, "is_kept": is_kept})


def pending_checkpoints() -> list[str]:
    """Names of the checkpoints that are still to be measured; a worker asks."""
    listed = ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
    pending = ray.train.ReportedCheckpointStatus.PENDING_VALIDATION
    return [PurePath(found.checkpoint.path).name for found in listed if found.status == pending]


def wait_until_validated() -> None:
    """Wait for all of these; a worker does."""
    ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.VALIDATED)
