"""The ledger: which samples of the stream have been trained on.

Every position before the cursor is done. Beyond it stand the few positions that are done out of turn or half done,
each with the set of its finished rows as a bit mask. What was read ahead but not trained on is not in it. The ledger
travels inside the checkpoint whose weights it describes.
"""

from collections.abc import Callable, Mapping

import numpy as np


class Ledger:
    """Finished samples by (position, row). `rows_at(position)` is the number of rows that a position has."""

    def __init__(
        self, rows_at: Callable[[int], int], cursor: int = 0, partial: Mapping[int, int] | None = None
    ) -> None:
        self._rows_at = rows_at
        self.cursor = cursor
        self._partial = dict(partial or {})

    def add(self, positions: np.ndarray, rows: np.ndarray) -> None:
        """Mark samples as trained on; both arrays [num_samples].

        Raises ValueError for a sample that was marked before: the stream would have given it twice.
        """
        for position, row in zip(positions.tolist(), rows.tolist(), strict=True):
            done = self._partial.get(position, 0)
            if position < self.cursor or done >> row & 1:
                raise ValueError(f"sample (position {position}, row {row}) was trained on twice")
            self._partial[position] = done | 1 << row
        self._advance()

    def _advance(self) -> None:
        while (done := self._partial.get(self.cursor)) is not None and done == (1 << self._rows_at(self.cursor)) - 1:
            del self._partial[self.cursor]
            self.cursor += 1

    def remaining_rows(self, position: int) -> np.ndarray:
        """The rows of a position that have not been trained on, int64, ascending."""
        if position < self.cursor:
            return np.empty(0, dtype=np.int64)
        done = self._partial.get(position, 0)
        rows = np.arange(self._rows_at(position))
        if not done:
            return rows
        return rows[[not done >> row & 1 for row in rows.tolist()]]

    def num_done_beyond_cursor(self) -> int:
        """How many samples at or after the cursor have been trained on."""
        return sum(done.bit_count() for done in self._partial.values())

    def to_dict(self, within: range | None = None) -> dict[str, object]:
        """As JSON can hold it: the cursor, and each position beyond it with the hexadecimal mask of its done rows.

        `within` leaves out what is done at other positions.
        """
        kept = {p: done for p, done in self._partial.items() if within is None or p in within}
        return {"cursor": self.cursor, "partial": {str(p): f"{done:x}" for p, done in sorted(kept.items())}}

    @classmethod
    def from_dict(cls, state: Mapping[str, object], rows_at: Callable[[int], int]) -> "Ledger":
        """The ledger that `to_dict` wrote."""
        cursor, partial = state["cursor"], state["partial"]
        assert isinstance(cursor, int) and isinstance(partial, Mapping)
        return cls(rows_at, cursor, {int(position): int(done, 16) for position, done in partial.items()})
