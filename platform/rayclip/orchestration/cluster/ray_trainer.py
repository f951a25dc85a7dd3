"""Ray's TorchTrainer with fewer processes to start: a run's first step comes seconds earlier.

With `ray_internals.py` the only place that leans on what is private to Ray.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayclip.io.conditional import conditional_file
from rayclip.io.lease import Fence
from rayclip.io.paths import RemotePath
from rayclip.io.s3 import ChangedError
from rayclip.orchestration.cluster.connection import owns_ray


class StreamTrainer(TorchTrainer):
    """Trains on the stream that its `dataset_config`, a `StreamConfig`, gives each group of workers.

    On a Ray that this process has started, all processes have its environment and end with it: none is started anew for
    an environment of its own, and none watches over placement groups that a dead driver leaves behind.

    Where `status_actor` has an error, workers that fail are not started again. `fence` is asked before a checkpoint
    gets into Ray Train's list, which is what makes it one.
    """

    def __init__(self, *args: Any, fence: Fence, status_actor: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fence, self._status_actor = fence, status_actor

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = [self._in_place_of(callback) for callback in super()._create_default_callbacks()]
        return [callback for callback in callbacks if callback is not None] + [FenceCheckpointList(self._fence)]

    def _in_place_of(self, callback: Any) -> Any:
        if isinstance(callback, DatasetsCallback):
            return StreamCallback(train_run_context=self.train_run_context, datasets=self.datasets)  # type: ignore[arg-type]
        if isinstance(callback, PlacementGroupCleanerCallback) and owns_ray():
            return InheritEnvironment()
        return callback

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        arguments["failure_policy"] = StopOnError(self.run_config.failure_config, self._status_actor)
        if not owns_ray():
            return super()._initialize_and_run_controller(**arguments)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor_class: Any = ray.remote(TrainController)
        controller = actor_class.options(num_cpus=0, scheduling_strategy=here).remote(**arguments)
        if threading.current_thread() is threading.main_thread():
            self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        result: Any = ray.get(controller.get_result.remote())
        return result


class StreamCallback(DatasetsCallback):
    """Asks for a group's stream where the group is started, in place of an actor of Ray's that would only do that."""

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """Give each worker what hands out its part of the stream; Ray Train calls this for every new group."""
        config: Any = self._data_config
        shards = Shards(config.configure(self._datasets, len(workers)))
        return {"dataset_shard_provider": [shards] * len(workers)}


class Shards:
    """What a worker's `ray.train.get_dataset_shard` asks. Picklable."""

    def __init__(self, by_rank: Sequence[dict[str, Any]]) -> None:
        self._by_rank = by_rank

    def get_dataset_shard(self, asked: Any) -> Any:
        """Return the worker's part of the data set."""
        return self._by_rank[asked.world_rank][asked.dataset_name]


class StopOnError(DefaultFailurePolicy):
    """Starts workers again as Ray Train does, but for an error of which the run's status actor knows that it stays."""

    def __init__(self, failure_config: Any, status_actor: Any) -> None:
        super().__init__(failure_config)
        self._status_actor = status_actor

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Return what Ray Train is to do; it asks after each failure."""
        with suppress(ray.exceptions.RayError):  # without the actor there is no driver, and soon no controller
            if ray.get(self._status_actor.error.remote()) is not None:
                return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class FenceCheckpointList(ControllerCallback):
    """Lets the controller write its list of checkpoints only while the run is its own.

    A list that one writes who has lost the run would hide the checkpoints of the one who has it, and delete some. In
    S3, where a write takes its time, it is also on condition that nobody has written the list since.
    """

    def __init__(self, fence: Fence) -> None:
        self._fence = fence
        self._version: str | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray Train calls this in the controller, which has its process to itself."""
        write = CheckpointManager._write_state_to_storage

        def checked(manager: CheckpointManager) -> None:
            self._fence.check()
            if isinstance(self._fence.folder, RemotePath):
                self._replace(manager)
            else:
                write(manager)

        CheckpointManager._write_state_to_storage = checked  # type: ignore[method-assign]

    def _replace(self, manager: CheckpointManager) -> None:
        """Write the list over the version that this process wrote, or found as its own to go on with."""
        path = RemotePath(f"s3://{manager._storage_context.checkpoint_manager_snapshot_path}")
        file, data = conditional_file(path, lock_name=""), manager._save_state().encode()
        while True:
            try:
                self._version = file.create(data) if self._version is None else file.replace(data, self._version)
            except ChangedError:
                self._fence.check()
                found = file.read()
                self._version = found and found.version
            else:
                return


class InheritEnvironment(ControllerCallback):
    """Lets workers have the environment that the node has, without one of their own: those that wait can be used."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray Train calls this in the controller."""
        constants.ENV_VARS_TO_PROPAGATE.clear()
