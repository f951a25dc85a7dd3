"""The stream over all epochs, through Ray to the workers: windows -> ranged reads -> decode -> batches of arrays."""

from functools import partial
from pathlib import PurePath
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayclip.data.stream import Stream, StreamSpec
from rayclip.io.paths import Place, place_of
from rayclip.orchestration.cluster.ray_storage import CHECKPOINT_LIST, train_result
from rayclip.orchestration.train.segments import Planner, Share
from rayclip.training.checkpoint import read_state

LEG_WINDOWS = 2_048
"""Windows that Ray plans at once."""


class StreamConfig(ray.train.DataConfig):
    """Gives each group of workers its stream: however many they are, it is what their checkpoint's ledger lacks."""

    def __init__(
        self, spec: StreamSpec, checkpoints: str, origin: Place | None = None, leg_windows: int | None = None
    ) -> None:
        super().__init__()
        self._spec, self._checkpoints, self._origin = spec, checkpoints, origin
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may go away
        options = Planner.options(scheduling_strategy=here)  # type: ignore[attr-defined]
        self._planner = options.remote(leg_windows or LEG_WINDOWS, context)

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> Any:
        """Ray Train calls this whenever it has started workers, that are to restore the latest checkpoint.

        A ledger from anywhere else could belong to other weights. Each worker gets a `Share`.
        """
        remaining = partial(remaining_stream, self._spec, self._checkpoints, self._origin)
        group = self._planner.begin.remote(remaining, world_size)
        return [{"train": Share(self._planner, group, rank)} for rank in range(world_size)]


def remaining_stream(spec: StreamSpec, checkpoints: str, origin: Place | None = None) -> Stream:
    """What the latest checkpoint's ledger lacks.

    Before the first one that is the ledger of `origin`, the checkpoint of another run that this one goes on from.
    """
    folder = latest_checkpoint(checkpoints) or origin
    return Stream(spec, read_state(folder).ledger if folder else None)


def latest_checkpoint(checkpoints: str) -> Place | None:
    """The checkpoint folder that a restart of the workers restores, None before the first."""
    folder = place_of(checkpoints)
    if not (folder / CHECKPOINT_LIST).is_file():
        return None
    checkpoint = train_result(folder).checkpoint
    return folder / PurePath(checkpoint.path).name if checkpoint else None
