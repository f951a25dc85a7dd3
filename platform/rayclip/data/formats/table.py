"""CSV and TSV with a column of pictures' paths or addresses and one or more of captions.

A chunk is a range of bytes that holds whole records. Text is read as UTF-8; what is not comes through as the bytes it
is, so that one bad caption is one bad sample.
"""

import csv
import io
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import BinaryIO

from rayclip.data.formats.base import ChunkError, Layout, Sample, Shard, Span
from rayclip.data.formats.members import add_images, caption_members
from rayclip.io.storage import open_file, read_range, split

Row = dict[str, str]

_HEADER_BYTES = 2**16


def list_chunks(shard: Shard, chunk_samples: int, layout: Layout) -> list[Span]:
    """Runs of `chunk_samples` neighbours. Raises OSError for a file that is no such table."""
    spans = []
    try:
        with open_file(shard.path) as file:
            ends = _record_ends(file, layout.separator)
            start = end = next(ends, 0)  # of the header
            num_samples = 0
            for end in ends:
                num_samples += 1
                if num_samples == chunk_samples:
                    spans.append(Span(start, end - start, num_samples))
                    start, num_samples = end, 0
    except csv.Error as error:
        raise ChunkError(f"'{shard.path}' is not a table: {error}") from None
    return [*spans, Span(start, end - start, num_samples)] if num_samples else spans


def read_chunk(shard: Shard, span: Span, layout: Layout) -> list[Sample]:
    """The samples of a range of bytes. Raises OSError where it cannot be read."""
    samples, pictures = [], []
    for row in read_rows(shard, span, layout):
        path = row.get(layout.image_column) or ""
        captions = [_encode(row.get(column)) for column in layout.caption_columns]
        sample = {"__key__": (_encode(path) or b"")} | caption_members(layout.caption_columns, captions)
        samples.append(sample)
        if path:
            pictures.append((sample, path))
    add_images(pictures, layout.pictures or split(shard.path)[0])
    return samples


def read_rows(shard: Shard, span: Span, layout: Layout) -> Iterator[Row]:
    """The records of a range of bytes. Raises OSError where it cannot be read."""
    columns = _columns(shard, layout.separator)
    data = read_range(shard.path, span.offset, span.length)
    try:
        for values in _records(io.BytesIO(data), layout.separator):
            yield dict(zip(columns, values, strict=False))
    except csv.Error as error:
        raise ChunkError(f"'{shard.path}' is damaged at byte {span.offset:,}: {error}") from None


def read_header(shard: Shard, separator: str) -> tuple[str, list[str]]:
    """(separator, columns) of a file; without a separator it is a tab where the header has one, else a comma."""
    start = read_range(shard.path, 0, min(shard.size, _HEADER_BYTES)).removeprefix(b"\xef\xbb\xbf")
    separator = separator or ("\t" if b"\t" in start.partition(b"\n")[0] else ",")
    try:
        return separator, next(_records(io.BytesIO(start), separator), [])
    except csv.Error as error:
        raise ChunkError(f"'{shard.path}' is not a table: {error}") from None


@lru_cache(maxsize=1024)
def _columns(shard: Shard, separator: str) -> list[str]:
    return read_header(shard, separator)[1]


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


def _encode(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")
