"""Parquet with a column of pictures, as bytes or as paths, and one or more of captions.

A chunk is a row group, or a range of rows of one that is larger. Parquet can only be read from a row group's start, so
a range costs what lies before it in its group too: groups of up to a few hundred rows are best.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayclip.data.formats.base import PICTURE, ChunkError, Layout, Sample, Shard, Span, check_columns
from rayclip.data.formats.members import add_images, caption_members
from rayclip.io.storage import RemoteFile, is_remote, split

_BUFFER_BYTES = 4 * 2**20
_BATCH_ROWS = 64


def list_chunks(shard: Shard, chunk_samples: int, layout: Layout) -> list[Span]:
    """Row groups, those of more than twice `chunk_samples` in equal ranges. Raises OSError for what is no Parquet."""
    metadata = _read_metadata(shard)
    check_columns(shard, layout, metadata.schema.to_arrow_schema().names)
    starts, spans = _group_starts(metadata), []
    for start, end in pairwise(starts.tolist()):
        num_ranges = max(1, -(-(end - start) // chunk_samples)) if end - start > 2 * chunk_samples else 1
        edges = np.linspace(start, end, num_ranges + 1).round().astype(int).tolist()
        spans += [Span(a, b - a, b - a) for a, b in pairwise(edges) if b > a]
    return spans


def read_chunk(shard: Shard, span: Span, layout: Layout) -> list[Sample]:
    """The samples of a range of rows. Raises OSError where it cannot be read."""
    try:
        table = _read_rows(shard, span, layout)
        samples = [{"__key__": str(row).encode()} for row in range(span.offset, span.offset + span.length)]
        absent = _add_images(samples, table[layout.image_column], layout.pictures or split(shard.path)[0])
        captions = [_texts(_column(table, column)) for column in layout.caption_columns]
        for sample, *values in zip(samples, *captions, strict=True):
            sample |= caption_members(layout.caption_columns, values)
        return [s for s, none in zip(samples, absent, strict=True) if not none] if layout.careful else samples
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ChunkError(f"'{shard.path}' cannot be read: {error}") from None


def read_schema(shard: Shard) -> pa.Schema:
    """The columns of a file. Raises OSError for what is no Parquet."""
    return _read_metadata(shard).schema.to_arrow_schema()


def _read_metadata(shard: Shard) -> pq.FileMetaData:
    try:
        with _open(shard) as source:
            return pq.read_metadata(source)
    except pa.ArrowException as error:
        raise ChunkError(f"'{shard.path}' is not a whole Parquet file: {str(error).splitlines()[0]}") from None


_metadata = lru_cache(maxsize=256)(_read_metadata)


def _group_starts(metadata: pq.FileMetaData) -> np.ndarray:
    """The first row of each row group, and the number of rows in all."""
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _open(shard: Shard) -> Any:
    return pa.PythonFile(RemoteFile(*shard), mode="r") if is_remote(shard.path) else pa.OSFile(shard.path)


def _read_rows(shard: Shard, span: Span, layout: Layout) -> pa.Table:
    metadata = _metadata(shard)
    names = metadata.schema.to_arrow_schema().names
    starts = _group_starts(metadata)
    group = int(np.searchsorted(starts, span.offset, side="right")) - 1
    columns = list(dict.fromkeys(_outer(name, names) for name in (layout.image_column, *layout.caption_columns)))
    first, size = span.offset - int(starts[group]), int(starts[group + 1] - starts[group])
    with _open(shard) as source:
        if size == span.length:
            file = pq.ParquetFile(source, metadata=metadata, pre_buffer=True)
            return file.read_row_group(group, columns=columns, use_threads=False)
        # Page by page, and no further than the range.
        file = pq.ParquetFile(source, metadata=metadata, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        kept, at = [], 0
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
            kept.append(batch.slice(max(0, first - at), first + span.length - max(at, first)))
            at += len(batch)
            if at >= first + span.length:
                break
    return pa.Table.from_batches(kept)


def _outer(name: str, names: Sequence[str]) -> str:
    """The column that a name means: itself, or of "caption.en" the one that holds it."""
    return name if name in names else name.partition(".")[0]


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column, or a field within one, as in "caption.en"."""
    if name in table.column_names:
        return table[name]
    outer, *inner = name.split(".")
    return pc.struct_field(table[outer], inner)


def _add_images(samples: list[Sample], column: pa.ChunkedArray, folder: str) -> list[bool]:
    """From a column of bytes, of paths, or of Hugging Face's {bytes, path}; whether each row has none of them."""
    paths: list[str | None]
    if pa.types.is_struct(column.type):
        rows = [row or {} for row in column.to_pylist()]
        pictures, paths = [row.get("bytes") for row in rows], [row.get("path") for row in rows]
    elif is_text(column.type):
        pictures, paths = [None] * len(column), [_decode(path) for path in _texts(column)]
    else:
        pictures, paths = column.to_pylist(), [None] * len(column)
    for sample, picture in zip(samples, pictures, strict=True):
        if picture is not None:
            sample[PICTURE] = picture
    by_path = [(s, path) for s, picture, path in zip(samples, pictures, paths, strict=True) if picture is None and path]
    add_images(by_path, folder)
    return [picture is None and not path for picture, path in zip(pictures, paths, strict=True)]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _decode(path: object) -> str | None:
    return path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else None


def _texts(column: pa.ChunkedArray) -> list[Any]:
    """Values of a column; text as its bytes, which may not be UTF-8."""
    return (column.cast(pa.binary()) if is_text(column.type) else column).to_pylist()
