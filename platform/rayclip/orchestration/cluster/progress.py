"""One calm line of progress for people: it rewrites itself on a terminal, and elsewhere is printed now and then."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol, TextIO

_logger = logging.getLogger(__name__)
_shown: ContextVar[bool] = ContextVar("progress_shown", default=True)


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Show or hide the progress of what runs inside; what is hidden says its notes to the log, at level INFO."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def note(text: str) -> None:
    """Print a line of progress that stands by itself, or say it to the log where progress is hidden."""
    ProgressLine(0).note(text)


class Line(Protocol):
    """What shows progress to people: a line, a row of a table."""

    def update(self, done: int, rate: float | None = None, **shown: str) -> None:
        """Show how much is done, at so many units a second."""

    def note(self, text: str) -> None:
        """Show a text once, as a line of its own."""

    def close(self) -> None:
        """Show the last state; nothing follows."""


class ProgressLine:
    """`samples 12,800/100,000  1,204/s  eta 1:12` and whatever else the caller shows beside it."""

    def __init__(
        self, total: int, unit: str = "samples", start: int = 0, stream: TextIO | None = None, every_s: float = 10.0
    ) -> None:
        self.total, self.unit, self.stream = total, unit, stream or sys.stderr
        self._hidden = not _shown.get()
        self._terminal = self.stream.isatty()
        self._every_s = 0.2 if self._terminal else every_s
        self._first = (time.monotonic(), start)
        self._shown_at = float("-inf")
        self._last = self._written = ""

    def update(self, done: int, rate: float | None = None, **shown: str) -> None:
        """Show `done` of the total. `rate` in units a second; measured from the start where not given."""
        started_at, start = self._first
        now = time.monotonic()
        if rate is None:
            rate = (done - start) / max(now - started_at, 1e-9)
        eta = format_duration((self.total - done) / rate) if rate > 0 else "?"
        parts = [f"{self.unit} {done:,}/{self.total:,}", f"{rate:,.0f}/s", *(f"{k} {v}" for k, v in shown.items())]
        self._last = "  ".join([*parts, f"eta {eta}"])
        if now - self._shown_at >= self._every_s:
            self._shown_at = now
            self._write()

    def note(self, text: str) -> None:
        """A line of its own that stays above the progress."""
        if self._hidden:
            _logger.info(text)
            return
        self._print(f"\r\x1b[K{text}" if self._terminal else text)
        if self._terminal:
            self._written = ""  # it took the progress line's place

    def close(self) -> None:
        """Leave the last state standing."""
        if self._hidden:
            return
        if self._last != self._written:
            self._write()
        if self._last and self._terminal:
            self._print("")

    def _write(self) -> None:
        if self._hidden:
            return
        self._written = self._last
        if self._terminal:
            self._print(f"\r\x1b[K{self._last}", end="")
        else:
            self._print(self._last)

    def _print(self, text: str, end: str = "\n") -> None:
        with suppress(OSError):  # a terminal that has gone ends no training
            print(text, end=end, file=self.stream, flush=True)


def format_duration(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
