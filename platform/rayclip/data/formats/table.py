"""CSV and TSV with a column of pictures' paths or addresses and one or more of captions.

A chunk is a range of bytes that holds whole records. Text is read as UTF-8; what is not comes through as the bytes it
is, so that one bad caption is one bad sample. A row with more fields than the header is a bad sample too.
"""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from rayclip.data.formats.base import IMAGE_EXTENSIONS, ChunkError, Layout, Sample, Shard, Span, check_columns
from rayclip.data.formats.members import add_images, caption_members
from rayclip.data.formats.records import Record, RecordReader
from rayclip.io.storage import open_file, read_range, split

Row = dict[str, str]

SEPARATORS = ("\t", ",", ";", "|")
"""Those that a header is tried with, the first that it has first."""

_HEADER_BYTES = 2**16
_NUM_LINES_NAMED = 5
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Listing(NamedTuple):
    """A table's chunks, and what was found wrong in its rows."""

    spans: list[Span]
    num_strays: int
    """Quotes that open a field and do not close it."""
    num_malformed: int
    """Rows with more fields than the header."""
    malformed_lines: list[int]
    """The first few of those, by the number of their line."""


def list_chunks(shard: Shard, chunk_samples: int, layout: Layout) -> list[Span]:
    """Runs of `chunk_samples` neighbours. Raises OSError for a file that is no such table."""
    if layout.careful:
        return survey(shard, chunk_samples, layout).spans
    try:
        with open_file(shard.path) as file:
            ends = _record_ends(file, layout.separator)
            return _cut(next(ends, 0), ends, chunk_samples)
    except csv.Error as error:
        raise ChunkError(f"'{shard.path}' is not a table: {error}") from None


def survey(shard: Shard, chunk_samples: int, layout: Layout) -> Listing:
    """The chunks, by a careful reading, and what was met on the way. Raises OSError where the file cannot be read."""
    columns = _columns(shard, layout.separator)
    check_columns(shard, layout, columns)
    malformed: list[int] = []
    with open_file(shard.path) as file:
        reader = _reader(file, shard, layout)

        def ends() -> Iterator[int]:
            for record in reader:
                if len(record.fields) > len(columns):
                    malformed.append(record.line)
                yield record.end

        each = ends()
        spans = _cut(next(each, 0), each, chunk_samples)
    return Listing(spans, reader.num_strays, len(malformed), malformed[:_NUM_LINES_NAMED])


def read_records(shard: Shard, layout: Layout) -> Iterator[Record]:
    """All records of a file but its header, by a careful reading. Raises OSError where the file cannot be read."""
    with open_file(shard.path) as file:
        records = iter(_reader(file, shard, layout))
        next(records, None)
        yield from records


def needs_care(shard: Shard, spans: Sequence[Span], layout: Layout) -> bool:
    """Whether Python's csv reads anything else in these chunks than a careful reading does."""
    plain = replace(layout, careful=False)
    try:
        return any(list(_read_values(shard, s, layout)) != list(_read_values(shard, s, plain)) for s in spans)
    except ChunkError:
        return True


def read_chunk(shard: Shard, span: Span, layout: Layout) -> list[Sample]:
    """The samples of a range of bytes. Raises OSError where it cannot be read."""
    samples, pictures = [], []
    columns = _columns(shard, layout.separator)
    for values in _read_values(shard, span, layout):
        row = dict(zip(columns, values, strict=False))
        path = row.get(layout.image_column) or ""
        sample = {"__key__": (_encode(path) or b"")}
        samples.append(sample)
        if len(values) > len(columns):
            sample |= {"__no_image__": b"row_malformed", "__no_caption__": b"row_malformed"}
            continue
        captions = [_encode(row.get(column)) for column in layout.caption_columns]
        sample |= caption_members(layout.caption_columns, captions)
        if path:
            pictures.append((sample, path))
    add_images(pictures, layout.pictures or split(shard.path)[0])
    return samples


def read_rows(shard: Shard, span: Span, layout: Layout) -> Iterator[Row]:
    """The records of a range of bytes. Raises OSError where it cannot be read."""
    columns = _columns(shard, layout.separator)
    return (dict(zip(columns, values, strict=False)) for values in _read_values(shard, span, layout))


def read_header(shard: Shard, separator: str) -> tuple[str, list[str]]:
    """(separator, columns) of a file; without a separator it is a tab where the header has one, else a comma."""
    start = read_range(shard.path, 0, min(shard.size, _HEADER_BYTES)).removeprefix(b"\xef\xbb\xbf")
    if start.startswith(_UTF16):
        raise ChunkError(f"'{shard.path}' is not a table in UTF-8 but one in UTF-16: save it as UTF-8")
    first = start.partition(b"\n")[0].decode("utf-8", "surrogateescape")
    separator = separator or next((each for each in SEPARATORS if each in first), ",")
    try:
        return separator, next(_records(io.BytesIO(start), separator), [])
    except csv.Error as error:
        raise ChunkError(f"'{shard.path}' is not a table: {error}") from None


def find_header(shard: Shard, has_image: Callable[[Sequence[str]], bool]) -> tuple[str, list[str]]:
    """(separator, columns) of a file: the first separator that tells a column of pictures apart, or the likeliest."""
    usual = "\t" if shard.path.lower().endswith(".tsv") else ""
    read = [read_header(shard, separator) for separator in (usual, *SEPARATORS)]
    return next(((s, columns) for s, columns in read if len(columns) > 1 and has_image(columns)), read[0])


@lru_cache(maxsize=1024)
def _columns(shard: Shard, separator: str) -> list[str]:
    return read_header(shard, separator)[1]


def _read_values(shard: Shard, span: Span, layout: Layout) -> Iterator[list[str]]:
    data = io.BytesIO(read_range(shard.path, span.offset, span.length))
    if layout.careful:
        yield from (record.fields for record in _reader(data, shard, layout))
        return
    try:
        yield from _records(data, layout.separator)
    except csv.Error as error:
        raise ChunkError(f"'{shard.path}' is damaged at byte {span.offset:,}: {error}") from None


def _reader(lines: Iterable[bytes], shard: Shard, layout: Layout) -> RecordReader:
    columns = _columns(shard, layout.separator)
    image = columns.index(layout.image_column) if layout.image_column in columns else 0

    def is_record(fields: list[str]) -> bool:
        if len(fields) != len(columns):
            return False
        return layout.separator == "\t" or fields[image].rpartition(".")[2].lower() in IMAGE_EXTENSIONS

    return RecordReader(lines, layout.separator, is_record)


def _records(lines: Iterable[bytes], separator: str) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    text = (line.decode("utf-8", "surrogateescape") for line in lines)
    return (record for record in csv.reader(text, delimiter=separator) if record)


def _record_ends(file: BinaryIO, separator: str) -> Iterator[int]:
    """Where each record ends; empty lines belong to the record before."""
    at = 0

    def lines() -> Iterator[bytes]:
        nonlocal at
        for line in file:
            at += len(line)
            yield line

    for _ in _records(lines(), separator):
        yield at


def _cut(start: int, ends: Iterable[int], chunk_samples: int) -> list[Span]:
    """From the header's end and those of the records that follow."""
    spans, end, num_samples = [], start, 0
    for end in ends:
        num_samples += 1
        if num_samples == chunk_samples:
            spans.append(Span(start, end - start, num_samples))
            start, num_samples = end, 0
    return [*spans, Span(start, end - start, num_samples)] if num_samples else spans


def _encode(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")
