"""How long a request takes, learned from those before it: what TCP does for its timeouts (Jacobson, 1988; RFC 6298)."""

_UNIT_BYTES = 2**20
_LEAST_S = 0.1
_FIRST = 16
"""Requests after which what they took is believed."""


class LatencyEstimator:
    """A running mean of seconds, and of how far they are from it; a request's share for its bytes is taken out."""

    def __init__(self) -> None:
        self._count, self._mean_s, self._deviation_s = 0, 0.0, 0.0

    def add(self, seconds: float, num_bytes: int) -> None:
        """One request that was answered. Threads that do this at once lose a little, which does not matter."""
        taken_s = seconds / _share(num_bytes)
        if not self._count:
            self._mean_s, self._deviation_s = taken_s, taken_s / 2
        self._deviation_s += (abs(taken_s - self._mean_s) - self._deviation_s) / 4
        self._mean_s += (taken_s - self._mean_s) / 8
        self._count += 1

    def timeout_s(self, num_bytes: int, most_s: float) -> float:
        """After how long a request is later than nearly all are; `most_s` before there is anything to go by."""
        if self._count < _FIRST:
            return most_s
        return min(most_s, max(_LEAST_S, self._mean_s + 4 * self._deviation_s) * _share(num_bytes))


def _share(num_bytes: int) -> float:
    return 1 + num_bytes / _UNIT_BYTES
