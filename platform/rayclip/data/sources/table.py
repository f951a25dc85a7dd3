"""Source `table`: rows parted by tabs or , ; or |, with a path and a caption each, as open_clip's --train-data."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rayclip.config import TableConfig
from rayclip.data.decode import BadSampleError
from rayclip.data.formats.base import Layout, Shard
from rayclip.data.formats.table import find_header, read_header, read_records
from rayclip.data.sources.base import Record, Split, hold_out
from rayclip.data.sources.folder import file_size, read_image
from rayclip.errors import UserError

IMAGE_COLUMNS = ("filepath", "image_path", "image", "file_name", "path")
CAPTION_COLUMNS = ("title", "caption", "text")


class Item(NamedTuple):
    """A row: the picture's path, and its caption where the row has one."""

    path: str
    caption: str | None


class Malformed(NamedTuple):
    """A row with more fields than the header: which of them is the caption nobody knows."""

    path: str
    line: str


def splits(config: TableConfig, cache: Path) -> dict[str, Split]:
    """Every row, in the table's order. Raises UserError for a file that is no such table."""
    path = Path(config.path).resolve()
    if not path.is_file():
        raise UserError(f"source.path '{config.path}' is not a file")
    try:
        items = list(_read_items(Shard(str(path), path.stat().st_size), config))
    except OSError as error:
        raise UserError(f"'{config.path}' cannot be read: {error.strerror}" if error.strerror else str(error)) from None
    if not items:
        raise UserError(f"'{config.path}' has a header and no rows")
    return hold_out(items, [os.path.relpath(item.path, path.parent) for item in items], config.held_out_share)


def _read_items(shard: Shard, config: TableConfig) -> Iterator[Item | Malformed]:
    """As rayclip index reads a table."""
    if config.separator:
        separator, columns = read_header(shard, config.separator)
    else:
        wanted = (config.image_column,) if config.image_column else IMAGE_COLUMNS
        separator, columns = find_header(shard, lambda columns: any(same_column(name, columns) for name in wanted))
    image = find_column("source.image_column", config.image_column, IMAGE_COLUMNS, columns, config.path)
    caption = find_column("source.caption_column", config.caption_column, CAPTION_COLUMNS, columns, config.path)
    folder = Path(shard.path).parent
    for record in read_records(shard, Layout("table", image, (caption,), separator, careful=True)):
        row = dict(zip(columns, record.fields, strict=False))
        path = str(folder / row.get(image, ""))
        if len(record.fields) > len(columns):
            yield Malformed(path, f"line {record.line}")
        else:
            yield Item(path, row.get(caption))


def read(item: Item | Malformed, config: TableConfig) -> Record:
    """One row's picture and caption. Raises BadSampleError."""
    if isinstance(item, Malformed):
        raise BadSampleError("row_malformed")
    if item.caption is None:
        raise BadSampleError("no_caption")
    try:
        item.caption.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 are read as they are
        raise BadSampleError("caption_not_utf8") from None
    return Record(read_image(Path(item.path)), item.caption)


def stamp(item: Item | Malformed) -> int:
    """What tells that a picture has changed; its caption is in the item."""
    return file_size(item.path)


def find_column(key: str, named: str | None, usual: tuple[str, ...], columns: list[str], path: str) -> str:
    """The named column, or the first of the usual ones, in any case. Raises UserError for a table without."""
    wanted = (named,) if named is not None else usual
    found = next((column for name in wanted if (column := same_column(name, columns)) is not None), None)
    if found is None and named is not None and "." in named and same_column(named.partition(".")[0], columns):
        return named  # a field within a column
    if found is None:
        raise UserError(
            f"'{path}' has no column '{wanted[0]}' ({key}); it has: {', '.join(columns) or 'an empty header'}"
        )
    return found


def same_column(name: str, columns: Sequence[str]) -> str | None:
    """The column of that name, or else the first that differs from it in case or blanks only; None where none does."""
    if name in columns:
        return name
    return next((column for column in columns if column.strip().lower() == name.lower()), None)
