"""Source `table`: a CSV or TSV file with a column of paths and a column of captions, as open_clip's --train-data."""

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rayclip.config import TableConfig
from rayclip.data.decode import BadSampleError
from rayclip.data.sources.base import Record, Split, hold_out
from rayclip.data.sources.folder import file_size, read_image
from rayclip.errors import UserError

IMAGE_COLUMNS = ("filepath", "image_path", "image", "file_name", "path")
CAPTION_COLUMNS = ("title", "caption", "text")


class Item(NamedTuple):
    """A row: the picture's path, and its caption where the row has one."""

    path: str
    caption: str | None


def splits(config: TableConfig, cache: Path) -> dict[str, Split]:
    """Every row, in the table's order. Raises UserError for a file that is no such table."""
    table = Path(config.path).resolve()
    if not table.is_file():
        raise UserError(f"source.path '{config.path}' is not a file")
    csv.field_size_limit(sys.maxsize)
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            header = lines.readline()
            lines.seek(0)
            rows = csv.DictReader(lines, delimiter=config.separator or ("\t" if "\t" in header else ","))
            columns = list(rows.fieldnames or [])
            image = find_column("source.image_column", config.image_column, IMAGE_COLUMNS, columns, config.path)
            caption = find_column("source.caption_column", config.caption_column, CAPTION_COLUMNS, columns, config.path)
            items = [Item(str(table.parent / (row[image] or "")), row[caption]) for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{config.path}' is not a table in UTF-8: {error}") from None
    if not items:
        raise UserError(f"'{config.path}' has a header and no rows")
    return hold_out(items, [os.path.relpath(item.path, table.parent) for item in items], config.held_out_share)


def read(item: Item, config: TableConfig) -> Record:
    """One row's picture and caption. Raises BadSampleError."""
    if item.caption is None:
        raise BadSampleError("no_caption")
    return Record(read_image(Path(item.path)), item.caption)


def stamp(item: Item) -> int:
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
