"""The order of a whole training run, as a function: (seed, position) -> chunk.

Position p of the stream is slot `p mod n` of epoch `p div n`, n being the number of chunks, and every epoch has its
own permutation of them. Nothing is drawn from a generator whose algorithm a library may change: a chunk's place is
the rank of a 64-bit mix of (seed, epoch, chunk), so the same numbers give the same order on every machine, forever.
In a mixture an epoch has a slot for each time that a chunk is due in it, n is their number, and slots are permuted.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 18  # positions or chunks that are worked on at once: arrays of 64 bits for all of them are kept few
_EXTRA = -2  # where an epoch stands in `epoch_order`; no epoch has this number

Shares = Sequence[tuple[int, float]]
"""(number of chunks, weight) of each part of a mixture."""


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
    mixed = np.empty(num_chunks, dtype=np.uint64)
    for block in blocks(range(num_chunks)):
        mixed[block] = mix64(seed, epoch, block)
    return np.argsort(mixed, kind="stable")


def blocks(numbers: range) -> Iterator[np.ndarray]:
    """Neighbouring numbers in arrays of a bounded size, int64."""
    for start in range(numbers.start, numbers.stop, _BLOCK):
        yield np.arange(start, min(start + _BLOCK, numbers.stop))


def epoch_slots(seed: int, epoch: int, shares: Shares) -> np.ndarray:
    """The chunks that are due in one epoch, int64, before they are permuted.

    A part's chunks are there floor(weight) times each. What is left of the weight is a share of the part's chunks,
    rounded to whole ones: the first by a 64-bit mix of (seed, epoch, chunk), which are there once more.
    """
    slots, first = [], 0
    for num_chunks, weight in shares:
        chunks = np.arange(first, first + num_chunks)
        slots += [chunks] * int(weight)
        if num_more := round(weight % 1 * num_chunks):
            rank = np.argsort(mix64(seed, _EXTRA, epoch, chunks), kind="stable")
            slots.append(first + np.sort(rank[:num_more]))
        first += num_chunks
    return np.concatenate([np.empty(0, dtype=np.int64), *slots])


class Order:
    """Which chunk stands at a position of the stream, and how the rows of a window of positions are mixed.

    A window is `window` neighbouring positions. Its samples are fetched together and emitted in an order of their
    own, so that samples which are neighbours in a shard meet different company in every epoch.
    """

    def __init__(self, seed: int, num_chunks: int | Shares, window: int = 1) -> None:
        """`num_chunks` are those of one data set, or the shares of a mixture."""
        self.seed, self.window = seed, window
        self.shares: Shares = ((num_chunks, 1.0),) if isinstance(num_chunks, int) else num_chunks
        # As many in every epoch.
        self.num_slots = sum(int(weight) * n + round(weight % 1 * n) for n, weight in self.shares)
        assert self.num_slots > 0 and window > 0
        # A window can straddle two epochs; a long-lived reader needs no more than these.
        self._epoch_chunks = lru_cache(maxsize=2)(self._permuted)

    def slots(self, epoch: int) -> np.ndarray:
        """The chunks of one epoch, int64 [num_slots], in no particular order."""
        return epoch_slots(self.seed, epoch, self.shares)

    def count(self, positions: range, num_samples: np.ndarray) -> int:
        """How many samples stand at neighbouring positions; `num_samples` are those of each chunk."""
        return sum(int(num_samples[self.chunks(block)].sum(dtype=np.int64)) for block in blocks(positions))

    def samples_in(self, epoch: int, num_samples: np.ndarray) -> int:
        """How many samples an epoch has."""
        if self.is_even:
            edges = np.cumsum([0, *(num_chunks for num_chunks, _ in self.shares)]).tolist()
            parts = zip(self.shares, itertools.pairwise(edges), strict=True)
            return sum(int(weight) * int(num_samples[a:b].sum(dtype=np.int64)) for (_, weight), (a, b) in parts)
        return int(num_samples[self.slots(epoch)].sum(dtype=np.int64))

    def samples_before(self, epoch: int, num_samples: np.ndarray) -> int:
        """How many samples the epochs before this one have."""
        if self.is_even:
            return epoch * self.samples_in(0, num_samples)
        return sum(self.samples_in(before, num_samples) for before in range(epoch))

    def find(self, sample: int, num_samples: np.ndarray) -> tuple[int, int]:
        """The epoch that a sample of the stream is in, and its number there."""
        if self.is_even:
            return divmod(sample, self.samples_in(0, num_samples))
        epoch = 0
        while sample >= (here := self.samples_in(epoch, num_samples)):
            sample, epoch = sample - here, epoch + 1
        return epoch, sample

    @property
    def is_even(self) -> bool:
        """Whether each epoch has the same chunks, as it does where no weight has a share left over."""
        return all(weight % 1 == 0 for _, weight in self.shares)

    def _permuted(self, epoch: int) -> np.ndarray:
        order = epoch_order(self.seed, epoch, self.num_slots).astype(np.min_scalar_type(self.num_slots))
        return order if [weight for _, weight in self.shares] == [1] else self.slots(epoch)[order].astype(order.dtype)

    def chunks(self, positions: np.ndarray) -> np.ndarray:
        """The chunk at each position, int64 [len(positions)]."""
        epochs, slots = np.divmod(np.asarray(positions, dtype=np.int64), self.num_slots)
        chunks = np.empty(len(slots), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chunks[here] = self._epoch_chunks(int(epoch))[slots[here]]
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
