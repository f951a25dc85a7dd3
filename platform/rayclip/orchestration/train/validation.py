"""Evaluation beside training: a checkpoint is measured in a process of its own, while the workers go on.

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
from rayclip.io.paths import Place, local_copy, place_of, staged
from rayclip.orchestration.cluster.resources import beside_bundle
from rayclip.orchestration.train.checkpoint_metrics import checkpoint_metrics, measure, points, told, with_average
from rayclip.orchestration.train.run_context import Job
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.tracking.mlflow import connect, log_once, log_picture
from rayclip.tracking.registry import link_checkpoint
from rayclip.training.checkpoint import load_model, read_metrics
from rayclip.training.loop import Metrics

_ATTEMPTS = 3


class _TryAgainError(Exception):
    """What Ray starts a measurement again for."""


@dataclass(frozen=True)
class Measurement:
    """Measures checkpoints of a run; Ray Train calls it, in a process that has `beside_bundle` to itself."""

    job: Job

    def __call__(self, checkpoint: ray.train.Checkpoint, samples_seen: int, is_kept: bool) -> dict[str, float]:
        """What the checkpoint's place among the others changes to: nothing, for one that is kept whatever it scores.

        Raises, after a line for people, where it cannot be measured; training goes on without.
        """
        folder = RunFolder(place_of(self.job.folder)).checkpoints / PurePath(checkpoint.path).name
        attempt: Any = ray.get(self.job.monitor.attempt.remote(samples_seen))
        try:
            if attempt > _ATTEMPTS:
                raise UserError(f"its process died {_ATTEMPTS} times")
            score = self._measure(folder, samples_seen)
        except Exception as error:
            if attempt < _ATTEMPTS and not isinstance(error, UserError):
                raise _TryAgainError from error
            reason = " ".join(str(error).split()) or type(error).__name__
            self._note(f"the checkpoint at {samples_seen:,} samples could not be measured: {reason}; training goes on")
            self._link(folder, samples_seen, {})
            raise
        return {} if is_kept else {"score": score}

    def _measure(self, folder: Place, samples_seen: int) -> float:
        content = read_metrics(folder)
        if not content["measured"]:
            content = checkpoint_metrics(self.job.config, samples_seen, self._run_tasks(folder))
            write_json(folder / "metrics.json", content)
        self._publish(folder, samples_seen, content["tasks"])
        return content["score"]

    def _run_tasks(self, folder: Place) -> Metrics:
        config, bundle = self.job.config, beside_bundle(self.job.config)
        torch.set_num_threads(max(1, int(bundle["CPU"])))
        device = "cuda" if "GPU" in bundle else "cpu"
        with local_copy(folder) as copy, staged(RunFolder(place_of(self.job.folder)).pictures) as pictures:
            metrics = measure(config, load_model(copy).to(device), pictures)
            if config.ema is None:
                return metrics
            return with_average(metrics, measure(config, load_model(copy, ema=True).to(device)))

    def _publish(self, folder: Place, samples_seen: int, metrics: Metrics) -> None:
        client, run_id = connect(self.job.tracking_uri), self.job.mlflow_run_id
        self._link(folder, samples_seen, metrics)
        log_once(client, run_id, points(metrics), samples_seen)
        with local_copy(RunFolder(place_of(self.job.folder)).pictures) as pictures:
            for picture in pictures.glob("*.png"):
                log_picture(client, run_id, picture)
        self._note(told(samples_seen, metrics))

    def _link(self, folder: Place, samples_seen: int, metrics: Metrics) -> None:
        link_checkpoint(connect(self.job.tracking_uri), self.job.mlflow_run_id, folder, samples_seen, metrics)

    def _note(self, line: str) -> None:
        self.job.monitor.note.remote(line)


def measurements(job: Job) -> ray.train.ValidationConfig:
    """How Ray Train has checkpoints measured that workers report with `to_measure`."""
    bundle = beside_bundle(job.config)
    resources: dict[str, Any] = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)}
    # A process that dies is started again without end: it counts its attempts itself, and says so before it gives up.
    retries: dict[str, Any] = {"max_retries": -1, "retry_exceptions": [_TryAgainError]}
    # It is called with what `to_measure` gives, and with nothing else.
    return ray.train.ValidationConfig(Measurement(job), ray_remote_kwargs=resources | retries)  # type: ignore[arg-type]


def to_measure(samples_seen: int, is_kept: bool) -> ray.train.ValidationTaskConfig:
    """What a worker reports a checkpoint with that is to be measured."""
    return ray.train.ValidationTaskConfig(fn_kwargs={"samples_seen": samples_seen, "is_kept": is_kept})


def waiting_checkpoints() -> list[str]:
    """Names of the checkpoints that are still to be measured; a worker asks."""
    listed = ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
    pending = ray.train.ReportedCheckpointStatus.PENDING_VALIDATION
    return [PurePath(found.checkpoint.path).name for found in listed if found.status == pending]


def wait_until_measured() -> None:
    """Wait for all of these; a worker does."""
    ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.VALIDATED)
