"""The stream over all epochs, through Ray to the workers: windows -> ranged reads -> decode -> batches of arrays."""

from functools import partial
from pathlib import PurePath
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayclip.data.stream import Stream, StreamSpec
from rayclip.io.paths import StoragePath, storage_path
from rayclip.orchestration.cluster.ray_internals import CHECKPOINT_LIST
from rayclip.orchestration.cluster.ray_storage import train_result
from rayclip.orchestration.train.segments import SegmentCoordinator, WorkerStream

SEGMENT_WINDOWS = 2_048
"""Windows that Ray plans at once."""


class StreamConfig(ray.train.DataConfig):
    """Gives each group of workers its stream: however many they are, it is what their checkpoint's ledger lacks."""

    def __init__(
        self,
        spec: StreamSpec,
        checkpoints: str,
        parent_checkpoint: StoragePath | None = None,
        segment_windows: int | None = None,
    ) -> None:
        super().__init__()
        self._spec, self._checkpoints, self._parent_checkpoint = spec, checkpoints, parent_checkpoint
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may go away
        options = SegmentCoordinator.options(scheduling_strategy=here)  # type: ignore[attr-defined]
        self._coordinator = options.remote(segment_windows or SEGMENT_WINDOWS, context)

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> Any:
        """Ray Train calls this whenever it has started workers, that are to restore the latest checkpoint.

        A ledger from anywhere else could belong to other weights. Each worker gets a `WorkerStream`.
        """
        remaining = partial(remaining_stream, self._spec, self._checkpoints, self._parent_checkpoint)
        group = self._coordinator.begin.remote(remaining, world_size)
        return [{"train": WorkerStream(self._coordinator, group, rank)} for rank in range(world_size)]


def remaining_stream(spec: StreamSpec, checkpoints: str, parent_checkpoint: StoragePath | None = None) -> Stream:
    """What the latest checkpoint's ledger lacks.

    Before the first one that is the ledger of `parent_checkpoint`, of the run that this one branches off from.
    """
    folder = latest_checkpoint(checkpoints) or parent_checkpoint
    if folder is None:
        return Stream(spec, None)
    from rayclip.training.checkpoint import read_state  # brings torch, which a fresh run's stream can do without

    return Stream(spec, read_state(folder).ledger)


def latest_checkpoint(checkpoints: str) -> StoragePath | None:
    """The checkpoint folder that a restart of the workers restores, None before the first."""
    folder = storage_path(checkpoints)
    if not (folder / CHECKPOINT_LIST).is_file():
        return None
    checkpoint = train_result(folder).checkpoint
    return folder / PurePath(checkpoint.path).name if checkpoint else None
