"""A sweep while it goes: a table of its trials, redrawn calmly on a terminal; elsewhere a line now and then."""

import shutil
import sys
import time
from dataclasses import dataclass
from typing import TextIO

from rayclip.orchestration.cluster.progress import format_duration

WAITING, STARTING, TRAINING = "waiting", "starting", "training"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
ENDED = (FINISHED, STOPPED, FAILED)

_HEADER = ("trial", "state", "samples", "rate", "loss", "metric", "eta")


@dataclass
class TrialLine:
    """What is known of one trial. `samples` are those it trains itself, `cost` what one of them takes."""

    name: str
    total: int
    cost: float
    state: str = WAITING
    samples: int = 0
    rate: float = 0.0
    loss: str = ""
    metric: float | None = None
    reason: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the trial's row of the table."""
        going = self.state == TRAINING and self.rate > 0
        return (
            self.name,
            self.state,
            f"{self.samples:,}/{self.total:,}",
            f"{self.rate:,.0f}/s" if going else "",
            self.loss,
            "" if self.metric is None else f"{self.metric:.1%}",
            format_duration((self.total - self.samples) / self.rate) if going else self.reason[:60],
        )


class SweepTable:
    """The table of all trials, in their order."""

    def __init__(self, lines: list[TrialLine], stream: TextIO | None = None) -> None:
        self._lines = {line.name: line for line in lines}
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every_s = 1.0 if self._terminal else 10.0
        self._drawn = 0
        self._shown_at = time.monotonic()
        self._first = (time.monotonic(), self._done())

    def add(self, line: TrialLine) -> None:
        """Add a row for a trial."""
        self._lines[line.name] = line

    def change(self, name: str, **changes: object) -> None:
        """Take what is new of a trial; a new state is shown at once, the rest at the next look."""
        line = self._lines[name]
        before = line.state
        for key, value in changes.items():
            setattr(line, key, value)
        if line.state != before and not self._terminal:
            print("  ".join(filter(None, line.cells())), file=self._stream, flush=True)

    def refresh(self, at_once: bool = False) -> None:
        """Show the table where it is time."""
        now = time.monotonic()
        if not at_once and now - self._shown_at < self._every_s:
            return
        self._shown_at = now
        self._draw() if self._terminal else print(self.total_line(), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A line that stays, above the table."""
        print(f"{self._up()}{text}", file=self._stream, flush=True)
        self._drawn = 0

    def total_line(self) -> str:
        """All trials together; the time left is by compute, as the sweep has gone since it was started."""
        lines = list(self._lines.values())
        counts = [f"{sum(line.state == state for line in lines)} {state}" for state in (TRAINING, *ENDED)]
        samples = f"{sum(line.samples for line in lines):,}/{sum(line.total for line in lines):,} samples"
        return f"{len(lines)} trials: {', '.join(counts)}; {samples}; eta {self._eta()}"

    def _eta(self) -> str:
        started_at, before = self._first
        speed = (self._done() - before) / max(time.monotonic() - started_at, 1e-9)
        left = sum((line.total - line.samples) * line.cost for line in self._lines.values() if line.state not in ENDED)
        return format_duration(left / speed) if speed > 0 else "?"

    def _done(self) -> float:
        return sum(line.samples * line.cost for line in self._lines.values())

    def _draw(self) -> None:
        rows = [_HEADER, *(line.cells() for line in self._visible())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        width = shutil.get_terminal_size().columns
        text = "\n".join(line.rstrip()[: width - 1] for line in [*shown, self.total_line()])
        print(self._up() + text, file=self._stream, flush=True)
        self._drawn = len(shown) + 1

    def _visible(self) -> list[TrialLine]:
        """As many as the terminal has lines for: those that go, the last that ended, the next that wait."""
        room = shutil.get_terminal_size().lines - 3
        lines = list(self._lines.values())
        if len(lines) <= room:
            return lines
        urgency = {TRAINING: 0, STARTING: 0, FAILED: 1, WAITING: 3}
        chosen = sorted(lines, key=lambda line: urgency.get(line.state, 2))[: max(room, 1)]
        return [line for line in lines if any(line is one for one in chosen)]

    def _up(self) -> str:
        return f"\x1b[{self._drawn}F\x1b[J" if self._terminal and self._drawn else ""
