"""Where the time of a run goes: samples a second, and the share of it spent waiting for data."""

import time
from collections.abc import Iterable, Iterator

from rayclip.data.stream import Batch
from rayclip.training.checkpoint import RunState


class Meter:
    """Adds the time of each step, and of the wait before it, to the state; and measures a window of recent steps."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.start_window()

    def start_window(self) -> None:
        """Forget the steps before; rates are measured from here."""
        self._window = (self._state.samples_seen, self._state.train_time_s, self._state.data_wait_s)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, timed: what passes until the next one is asked for is training, until it comes waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            came = time.perf_counter()
            if batch is None:
                return
            self._paused_s = 0.0
            yield batch
            self._state.data_wait_s += came - asked
            self._state.train_time_s += time.perf_counter() - asked - self._paused_s

    def pause(self, seconds: float) -> None:
        """Take what was no training (an evaluation, a checkpoint) out of the running step's time."""
        self._paused_s += seconds

    def rates(self) -> dict[str, float]:
        """Over the window: `samples_per_s` of all ranks, and `data_wait_share` of this one."""
        samples, train_time_s, data_wait_s = self._window
        elapsed = max(self._state.train_time_s - train_time_s, 1e-9)
        return {
            "samples_per_s": (self._state.samples_seen - samples) / elapsed,
            "data_wait_share": (self._state.data_wait_s - data_wait_s) / elapsed,
        }
