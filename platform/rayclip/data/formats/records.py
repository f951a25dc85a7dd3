"""Records of a table with separators, told apart with care: a quote counts only where it closes.

Python's csv reads what is quoted by the rules, and is used for that. A caption that merely begins with a quote would
take all lines up to the next quote with it. Here a field is quoted if its quote closes before a separator or the end of
a line, and none of the lines up to there is a record by itself; else the quote is a character like others.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

_MOST_LINES = 1000
"""That a quoted field is looked for the end of."""


class Record(NamedTuple):
    """A row: its fields, its first line's number from 1, and where its bytes end."""

    fields: list[str]
    line: int
    end: int


class RecordReader:
    """Records from lines of bytes. `num_strays` counts the quotes that the rules of CSV would have read otherwise."""

    def __init__(self, lines: Iterable[bytes], separator: str, is_record: Callable[[list[str]], bool]) -> None:
        self._lines, self._separator, self._is_record = iter(lines), separator, is_record
        self._ahead: deque[bytes] = deque()
        self._line = self._at = 0
        self.num_strays = 0

    def __iter__(self) -> Iterator[Record]:
        while True:
            self._fill(1)
            if not self._ahead:
                return
            fields, num_lines = self._parse(_text(self._ahead[0]))
            first = self._line + 1
            for _ in range(num_lines):
                self._at += len(self._ahead.popleft())
                self._line += 1
            if fields != [""]:
                yield Record(fields, first, self._at)

    def _fill(self, num_lines: int) -> None:
        while len(self._ahead) < num_lines:
            line = next(self._lines, None)
            if line is None:
                return
            self._ahead.append(line)

    def _parse(self, text: str) -> tuple[list[str], int]:
        """(fields, how many lines they are on) of the record that begins with this line."""
        if '"' not in text:
            return text.rstrip("\r\n").split(self._separator), 1
        fields, at, num_lines = list[str](), 0, 1
        while True:
            quoted = self._quoted(text, at, num_lines) if text.startswith('"', at) else None
            if quoted is not None:
                field, at, text, num_lines = quoted
            else:
                self.num_strays += text.startswith('"', at)
                end = self._field_end(text, at)
                field, at = text[at:end], end
            fields.append(field)
            if not text.startswith(self._separator, at):
                return fields, num_lines
            at += len(self._separator)

    def _field_end(self, text: str, at: int) -> int:
        end = text.find(self._separator, at)
        return end if end >= 0 else len(text.rstrip("\r\n"))

    def _quoted(self, text: str, at: int, num_lines: int) -> tuple[str, int, str, int] | None:
        """(field, where it ends, the text with the lines it took, lines), where the quote at `at` closes."""
        seen = at + 1
        while True:
            quote = text.find('"', seen)
            if quote < 0:
                seen, num_lines = len(text), num_lines + 1
                following = self._following(num_lines)
                if following is None:
                    return None
                text += following
            elif text.startswith('"', quote + 1):
                seen = quote + 2
            else:
                closes = not text[quote + 1 :].rstrip("\r\n") or text.startswith(self._separator, quote + 1)
                return (text[at + 1 : quote].replace('""', '"'), quote + 1, text, num_lines) if closes else None

    def _following(self, num_lines: int) -> str | None:
        """The line that a quoted field goes on in; None where there is none, or it is a record by itself."""
        self._fill(num_lines)
        if len(self._ahead) < num_lines or num_lines > _MOST_LINES:
            return None
        text = _text(self._ahead[num_lines - 1])
        return None if self._is_record(text.rstrip("\r\n").split(self._separator)) else text


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")
