"""What the processes of a run are told: those that train, and the one that measures beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from rayclip.config import TrainConfig
from rayclip.data.stream import StreamSpec
from rayclip.io.lease import Fence
from rayclip.io.paths import StoragePath


@dataclass(frozen=True)
class RunContext:
    """All that a worker needs to know."""

    config: TrainConfig
    spec: StreamSpec
    total_samples: int
    folder: str
    tracking_uri: str
    mlflow_run_id: str
    code_version: str
    status_actor: ActorHandle
    generation: int
    """Which start of the run this is: it is in the run's record and in each checkpoint that this one saves."""
    fence: Fence
    """Asked before anything is written to the run's folder or to its MLflow run."""
    parent_checkpoint: StoragePath | None = None
    """The checkpoint of another run that a branch begins with."""
    awaits_decision: bool = False
    """Whether the run waits after each evaluation to hear if it goes on."""

    @property
    def validates_asynchronously(self) -> bool:
        """Whether evaluations during training are made in a process of their own; a judged run waits for them."""
        return self.config.evaluation.is_asynchronous and not self.awaits_decision

    def link_checkpoint(self, folder: StoragePath, samples_seen: int, metrics: Mapping[str, Any]) -> None:
        """Have the MLflow run point at a checkpoint, with what was measured of it."""
        # Workers import this module too, and start seconds earlier without MLflow.
        from rayclip.tracking.mlflow import connect
        from rayclip.tracking.registry import link_checkpoint

        link_checkpoint(connect(self.tracking_uri), self.mlflow_run_id, folder, samples_seen, metrics)


class StoppedError(Exception):
    """The run was stopped at an evaluation; what it has trained is in its last checkpoint."""
