"""Timing two functions that do the same work."""

import statistics
import time
from collections.abc import Callable


def paired_times(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratio theirs / ours, run in turn after a warm-up.

    In turn, because a shared machine's speed drifts: the ratio of neighbours holds, that of two averages may not.
    """
    ours(), theirs()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(repeats)]
    ours_s, theirs_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return ours_s, theirs_s, statistics.median(b / a for a, b in pairs)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
