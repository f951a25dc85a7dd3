"""A queue that gathers while the model is busy, so that batches grow with the load and nobody waits without it."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class QueueFullError(Exception):
    """More waits than may wait: answer 429."""


class _Entry(Generic[T, R]):
    """A caller's items, how many of them a batch has taken, and the results so far."""

    def __init__(self, items: list[T]) -> None:
        self.items = items
        self.taken = 0
        self.results: list[R] = []
        self.done: asyncio.Future[list[R]] = asyncio.get_running_loop().create_future()


class GatherQueue(Generic[T, R]):
    """Runs `run` on batches of what several callers have submitted, one batch at a time.

    An idle model starts at once with what there is. While it runs, everything that comes is gathered, up to
    `max_batch_size` items for the next batch. A caller with many items shares: after each batch the rest of them goes
    to the back. A caller that is cancelled leaves the queue, and what it alone had asked for is not computed.
    """

    def __init__(
        self, run: Callable[[list[T]], list[R]], max_batch_size: int, max_waiting: int, executor: Executor
    ) -> None:
        self._run = run
        self._max_batch_size = max_batch_size
        self._max_waiting = max_waiting
        self._executor = executor
        self._entries: deque[_Entry[T, R]] = deque()
        self._drain: asyncio.Task[None] | None = None
        self.waiting = 0
        """Items that no batch has taken yet."""

    def check_room(self, num_items: int) -> None:
        """Raise QueueFullError where `num_items` more would be too many; an idle queue takes any number."""
        if self.waiting and self.waiting + num_items > self._max_waiting:
            raise QueueFullError

    async def submit(self, items: list[T]) -> list[R]:
        """Results in the order of the items. Raises QueueFullError, and what `run` raised for a batch of theirs."""
        if not items:
            return []
        self.check_room(len(items))
        entry: _Entry[T, R] = _Entry(items)
        self._entries.append(entry)
        self.waiting += len(items)
        if self._drain is None:
            self._drain = asyncio.create_task(self._run_batches())
        try:
            return await entry.done
        finally:
            self._leave(entry)

    def _leave(self, entry: _Entry[T, R]) -> None:
        """After a cancellation or a failed batch: what is left of the entry waits no more."""
        self.waiting -= len(entry.items) - entry.taken
        entry.taken = len(entry.items)

    async def _run_batches(self) -> None:
        try:
            while batch := self._gather():
                await self._run_batch(batch)
        finally:
            self._drain = None

    def _gather(self) -> list[tuple[_Entry[T, R], list[T]]]:
        """The next batch: each entry with the items it has in it."""
        batch, room, unfinished = [], self._max_batch_size, []
        while room and self._entries:
            entry = self._entries.popleft()
            if entry.done.done():  # cancelled, or failed in a batch before
                continue
            items = entry.items[entry.taken : entry.taken + room]
            batch.append((entry, items))
            room -= len(items)
            entry.taken += len(items)
            self.waiting -= len(items)
            if entry.taken < len(entry.items):
                unfinished.append(entry)
        self._entries.extend(unfinished)
        return batch

    async def _run_batch(self, batch: list[tuple[_Entry[T, R], list[T]]]) -> None:
        items = [item for _, part in batch for item in part]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._executor, self._run, items)
        except Exception as error:
            for entry, _ in batch:
                if not entry.done.done():
                    entry.done.set_exception(error)
            return
        start = 0
        for entry, part in batch:
            entry.results += results[start : start + len(part)]
            start += len(part)
            if len(entry.results) == len(entry.items) and not entry.done.done():
                entry.done.set_result(entry.results)
