"""A segment of the stream: neighbouring windows, with only as much of the manifest and the order as reading takes."""

import numpy as np

from rayclip.data.manifest import Manifest
from rayclip.data.mixture import Mixture
from rayclip.data.order import Order
from rayclip.data.stream import Stream


class StreamSegment(Stream):
    """The windows of `stream` in a range, to be read without it.

    It travels to every reader: so none of them holds the manifest, which may have millions of chunks.
    """

    def __init__(self, stream: Stream, windows: range) -> None:
        size, end = stream.spec.window, stream.spec.end
        positions = range(windows.start * size, min(windows.stop * size, end))
        super().__init__(stream.spec, stream.ledger().to_dict(within=positions))
        self._windows, self._positions = windows, positions
        kept, chunks = np.unique(stream.order.chunks(np.arange(positions.start, positions.stop)), return_inverse=True)
        self._manifest, self._order = stream.manifest.take(kept), _Excerpt(stream.order, positions.start, chunks)

    @property
    def manifest(self) -> Manifest | Mixture:
        """The manifest of the segment's own chunks."""
        return self._manifest

    @property
    def order(self) -> Order:
        """Which of its chunks stands at each position of the segment."""
        return self._order

    def windows(self) -> range:
        """All of the segment's windows, also those of which the ledger lacks nothing."""
        return self._windows

    def num_remaining(self) -> int:
        """How many of the segment's samples the ledger lacks."""
        ledger = self.ledger()
        left = range(max(ledger.cursor, self._positions.start), self._positions.stop)
        return self.order.count(left, self.manifest.num_samples) - ledger.num_done_beyond_cursor()


class _Excerpt(Order):
    """What an order says of the positions from `first` on: the chunks that stand there."""

    def __init__(self, order: Order, first: int, chunks: np.ndarray) -> None:
        self.seed, self.window = order.seed, order.window
        self._first, self._chunks = first, chunks

    def chunks(self, positions: np.ndarray) -> np.ndarray:
        return self._chunks[positions - self._first]
