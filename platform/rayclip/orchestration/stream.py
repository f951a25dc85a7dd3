"""The stream as one Ray Data execution over all epochs: windows -> ranged reads -> decode -> batches of arrays."""

from collections.abc import Iterator
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import ray
import ray.train

from rayclip.data.stream import Batch, Stream, StreamSpec
from rayclip.orchestration.filesystem import CHECKPOINT_LIST, train_result
from rayclip.places import Place, place_of
from rayclip.training.checkpoint import read_state


class StreamConfig(ray.train.DataConfig):
    """Gives each group of workers its stream: however many they are, it is what their checkpoint's ledger lacks."""

    def __init__(self, spec: StreamSpec, checkpoints: str, origin: Place | None = None) -> None:
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True))
        self._spec, self._checkpoints, self._origin = spec, checkpoints, origin

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> Any:
        """Ray Train calls this whenever it has started workers, that have restored the latest checkpoint.

        A ledger from anywhere else could belong to other weights.
        """
        stream = remaining_dataset(self._spec, self._checkpoints, world_size, self._origin)
        return super().configure({"train": stream}, world_size, *args, **kwargs)


def remaining_dataset(
    spec: StreamSpec, checkpoints: str, num_workers: int, origin: Place | None = None
) -> ray.data.Dataset:
    """What the latest checkpoint's ledger lacks, as a Ray dataset of batches' columns.

    Before the first one that is the ledger of `origin`, the checkpoint of another run that this one goes on from.
    """
    folder = latest_checkpoint(checkpoints) or origin
    stream = Stream(spec, read_state(folder).ledger if folder else None)
    windows = stream.windows() or range(1)  # a run that has ended still needs a stream to find that out
    num_remaining = stream.num_remaining()
    # Ray splits the stream into equal parts and drops a remainder; rows that stand for no sample leave it none.
    padding = -num_remaining % num_workers if num_remaining else num_workers
    read = partial(_read, stream=stream, first=windows.start, last=windows.stop - 1, padding=padding)
    return ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(read, batch_size=1, num_cpus=1)


def latest_checkpoint(checkpoints: str) -> Place | None:
    """The checkpoint folder that a restart of the workers restores, None before the first."""
    folder = place_of(checkpoints)
    if not (folder / CHECKPOINT_LIST).is_file():
        return None
    checkpoint = train_result(folder).checkpoint
    return folder / PurePath(checkpoint.path).name if checkpoint else None


def batches(shard: ray.data.DataIterator, batch_size: int) -> Iterator[Batch]:
    """A worker's part of the stream."""
    yield from shard.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=2, drop_last=False)


def _read(row: dict[str, np.ndarray], stream: Stream, first: int, last: int, padding: int) -> Batch:
    window = first + int(row["id"][0])
    block = stream.read(window)
    if window == last and padding:
        rest = stream.padding(padding)
        block = {name: np.concatenate([block[name], rest[name]]) for name in block}
    return block
