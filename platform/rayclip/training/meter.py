"""Where the time of a run goes: samples a second, and the share of it spent waiting for data."""

import time
from collections.abc import Iterable, Iterator

from rayclip.data.stream import Batch
from rayclip.training.checkpoint import RunState


class Meter:
    """Adds the time of each step, and of the wait before it, to the state; and measures a window of recent steps."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._counted_to = time.perf_counter()
        self._running = False
        self.start_window()

    def start_window(self) -> None:
        """Forget the steps before; rates are measured from here."""
        self._count()
        self._window = (self._state.samples_seen, self._state.train_time_s, self._state.data_wait_s)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, timed: what passes until the next one is asked for is training, until it comes waiting.

        The wait for the first one is neither: it is the stream's start.
        """
        iterator = iter(batches)
        batch = next(iterator, None)
        asked = time.perf_counter()
        while batch is not None:
            self._state.data_wait_s += time.perf_counter() - asked
            self._counted_to, self._running = asked, True
            yield batch
            self._count()
            self._running = False
            asked = time.perf_counter()
            batch = next(iterator, None)

    def pause(self, seconds: float) -> None:
        """Take what was no training (an evaluation, a checkpoint) out of the running step's time."""
        self._counted_to += seconds

    def rates(self) -> dict[str, float]:
        """Over the window: `samples_per_s` of all ranks, and `data_wait_share` of this one."""
        self._count()
        samples, train_time_s, data_wait_s = self._window
        elapsed = max(self._state.train_time_s - train_time_s, 1e-9)
        return {
            "samples_per_s": (self._state.samples_seen - samples) / elapsed,
            "data_wait_share": (self._state.data_wait_s - data_wait_s) / elapsed,
        }

    def _count(self) -> None:
        """Bring the state's time up to now, so that what is shown or saved in a step holds that step too."""
        if self._running:
            now = time.perf_counter()
            self._state.train_time_s += now - self._counted_to
            self._counted_to = now
