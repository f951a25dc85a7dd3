"""The stream of training samples in segments, each a Ray Data execution of a bounded number of windows.

Ray plans an execution as a whole before its first task: about 10 KB a window, of which a run can have millions. A
segment bounds that, and the next one is begun before the one at hand ends, so that no worker waits where two meet.
"""

import itertools
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
from ray.actor import ActorHandle

from rayclip.data.segment import StreamSegment
from rayclip.data.stream import Batch, Stream, cut

_AHEAD_S = 20.0
"""How long before a segment ends, at the pace so far, the next one is begun: it takes some seconds to start."""
_BATCHES_AHEAD = 2

_Item = TypeVar("_Item")
_END: Any = object()


class SegmentSplit(NamedTuple):
    """One worker's part of a segment."""

    blocks: ray.data.DataIterator
    num_rows: int


@ray.remote(num_cpus=0, max_restarts=-1)
class SegmentCoordinator:
    """Plans one segment after another, the first one ahead of time, and forgets it when the last worker has its part.

    One serves all groups of workers that a run has, one after another: it is soon there for the next.
    """

    def __init__(self, segment_windows: int, context: ray.data.DataContext) -> None:
        self._segment_windows, self._context = segment_windows, context
        self._group: str | None = None
        self._parts: dict[int, dict[int, SegmentSplit | None]] = {}

    @ray.method(max_task_retries=-1)  # a process that takes the place of one that died can do it as well
    def begin(self, remaining: Callable[[], Stream], num_workers: int) -> str:
        """Share what remains of the stream out to a new group of workers, which is named by what this gives.

        It is read here: of what is wrong with it, all workers of the group hear.
        """
        self._group = uuid.uuid4().hex
        self._stream, self._num_workers = remaining(), num_workers
        self._windows = self._stream.windows()
        self._parts = {0: self._plan()}
        return self._group

    def part(self, group: str, number: int, rank: int) -> SegmentSplit | None:
        """The part of a segment that a worker of the group gets; None behind the last one."""
        if group != self._group:
            raise RuntimeError("the stream was shared out to other workers since, or what planned it has died")
        if number not in self._parts:
            self._parts[number] = self._plan()
        parts = self._parts[number]
        part = parts.pop(rank)
        if not parts:
            del self._parts[number]
        return part

    def _plan(self) -> dict[int, SegmentSplit | None]:
        while self._windows:
            segment = StreamSegment(self._stream, self._windows[: self._segment_windows])
            self._windows = self._windows[self._segment_windows :]
            if num_samples := segment.num_remaining():
                return dict(enumerate(self._split(segment, num_samples)))
        return dict.fromkeys(range(self._num_workers))

    def _split(self, segment: StreamSegment, num_samples: int) -> list[SegmentSplit]:
        # Ray splits a segment into equal parts and drops a remainder; rows that stand for no sample leave it none.
        padding = -num_samples % self._num_workers
        windows = segment.windows()
        with ray.data.DataContext.current(self._context):
            numbers = ray.data.range(len(windows), override_num_blocks=len(windows))
            dataset = numbers.map_batches(partial(_read, segment=segment, padding=padding), batch_size=1, num_cpus=1)
            parts = dataset.streaming_split(self._num_workers, equal=True)
        return [SegmentSplit(part, (num_samples + padding) // self._num_workers) for part in parts]


@dataclass(frozen=True)
class WorkerStream:
    """What one worker gets of the stream: its part of each segment. Small and picklable."""

    coordinator: ActorHandle
    group: ray.ObjectRef
    """What `SegmentCoordinator.begin` gives."""
    rank: int

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """As one stream, cut into batches, a few of them ahead of time; the last one may be smaller."""
        return _ahead(cut(self._blocks(), batch_size), _BATCHES_AHEAD)

    def _blocks(self) -> Iterator[Batch]:
        started, samples_consumed = time.monotonic(), 0
        coming = self._begin(0)
        for number in itertools.count(1):
            segment, following, consumed_before = coming, None, samples_consumed
            for block, num_left in segment:
                samples_consumed += len(block["row"])
                if following is None and num_left * (time.monotonic() - started) <= samples_consumed * _AHEAD_S:
                    following = self._begin(number)
                yield block
            if samples_consumed == consumed_before:
                return
            coming = following or self._begin(number)

    def _begin(self, number: int) -> Iterator[tuple[Batch, int]]:
        return _ahead(self._segment(number), 1)

    def _segment(self, number: int) -> Iterator[tuple[Batch, int]]:
        """Each block with the number of rows that the worker's part has after it; none behind the last segment."""
        part: Any = ray.get(self.coordinator.part.remote(self.group, number, self.rank))
        if part is None:
            return
        num_left = part.num_rows
        for block in part.blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            num_left -= len(block["row"])
            yield block, num_left


def _ahead(items: Iterator[_Item], depth: int) -> Iterator[_Item]:
    """The same items, made by a thread that begins now and stays at most so many of them ahead."""
    maker = ThreadPoolExecutor(1, thread_name_prefix="stream")
    made = deque(maker.submit(next, items, _END) for _ in range(depth))

    def taken() -> Iterator[_Item]:
        while (item := made.popleft().result()) is not _END:
            made.append(maker.submit(next, items, _END))
            yield item

    return taken()


def _read(row: dict[str, np.ndarray], segment: StreamSegment, padding: int) -> Batch:
    windows, number = segment.windows(), int(row["id"][0])
    block = segment.read(windows[number])
    if number == len(windows) - 1 and padding:
        rest = segment.padding(padding)
        block = {name: np.concatenate([block[name], rest[name]]) for name in block}
    return block
