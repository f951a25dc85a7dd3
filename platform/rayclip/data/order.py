"""The order of a whole training run, as a function: (seed, position) -> chunk.

Position p of the stream is slot `p mod n` of epoch `p div n`, n being the number of chunks, and every epoch has its
own permutation of them. Nothing is drawn from a generator whose algorithm a library may change: a chunk's place is
the rank of a 64-bit mix of (seed, epoch, chunk), so the same numbers give the same order on every machine, forever.
"""

from functools import lru_cache

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix64(seed: int, *values: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of (seed, values...), broadcast over arrays of integers.

    The finaliser is SplitMix64's (Steele, Lea and Flood, 2014), applied once a value, so equal numbers at different
    places in the list give unrelated hashes.
    """
    state = _scramble(np.asarray(seed & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64))
    for value in values:
        state = _scramble(state ^ np.asarray(value).astype(np.uint64))
    return state


def uniform(seed: int, *values: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1), a function of (seed, values...) as `mix64`."""
    return (mix64(seed, *values) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scramble(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        state = state + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        return state ^ (state >> np.uint64(31))


def epoch_order(seed: int, epoch: int, num_chunks: int) -> np.ndarray:
    """The permutation of chunks in one epoch, int64 [num_chunks]."""
    return np.argsort(mix64(seed, epoch, np.arange(num_chunks)), kind="stable")


class Order:
    """Which chunk stands at a position of the stream, and how the rows of a window of positions are mixed.

    A window is `window` neighbouring positions. Its samples are fetched together and emitted in an order of their
    own, so that samples which are neighbours in a shard meet different company in every epoch.
    """

    def __init__(self, seed: int, num_chunks: int, window: int = 1) -> None:
        assert num_chunks > 0 and window > 0
        self.seed, self.num_chunks, self.window = seed, num_chunks, window
        # A window can straddle two epochs; a long-lived reader needs no more than these.
        self._epoch_order = lru_cache(maxsize=2)(epoch_order)

    def chunks(self, positions: np.ndarray) -> np.ndarray:
        """The chunk at each position, int64 [len(positions)]."""
        epochs, slots = np.divmod(np.asarray(positions, dtype=np.int64), self.num_chunks)
        chunks = np.empty(len(slots), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chunks[here] = self._epoch_order(self.seed, int(epoch), self.num_chunks)[slots[here]]
        return chunks

    def positions(self, window: int, end: int) -> np.ndarray:
        """The positions of one window that lie before `end`."""
        return np.arange(window * self.window, min((window + 1) * self.window, end))

    def mix_rows(self, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The order in which a window emits its samples: an index into `positions` and `rows`, both [num_samples].

        A sample's rank among others depends on its own identity alone, so what is left of a window after a restart
        comes in the order it would have come in anyway.
        """
        return np.argsort(mix64(self.seed, positions, rows), kind="stable")
