"""From a row of a table to the files of a sample."""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from rayclip.data.formats.base import IMAGE_EXTENSIONS, PICTURE, USUAL_KEYS, Sample
from rayclip.io.s3 import requests
from rayclip.io.storage import is_remote, join, read_bytes


def add_images(wanted: Sequence[tuple[Sample, str]], folder: str) -> None:
    """Read the picture of each sample from its path, relative to the folder; in S3 many at once."""
    paths = [join(folder, path) for _, path in wanted]
    for (sample, _), path, picture in zip(wanted, paths, read_many(paths), strict=True):
        if isinstance(picture, bytes):
            sample[_extension(path)] = picture
        elif not isinstance(picture, FileNotFoundError):
            sample["__no_image__"] = b"image_unreadable"


def read_many(paths: Sequence[str]) -> list[bytes | OSError]:
    """The content of each file, or why there is none."""
    if any(map(is_remote, paths)):
        return list(requests().map(_read_or_error, paths))
    return [_read_or_error(path) for path in paths]


def _read_or_error(path: str) -> bytes | OSError:
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:  # a path with a zero byte in it is a ValueError
        return error if isinstance(error, OSError) else FileNotFoundError(path)


def _extension(path: str) -> str:
    extension = PurePosixPath(path).suffix[1:].lower()
    return extension if extension in IMAGE_EXTENSIONS else PICTURE


def pick(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field within one, as in "caption.en"; None where the row has none."""
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    value = row.get(outer)
    return pick(value, inner) if isinstance(value, Mapping) else None


def caption_members(columns: Sequence[str], values: Sequence[Any]) -> Sample:
    """One column of text as `txt`, bytes as they are; anything richer as `json`, an object by column.

    Where no column has a name that captions are looked for under (data/captions.py), all of them are there as
    "captions" too.
    """
    if len(columns) == 1 and isinstance(values[0], str | bytes | None):
        text = values[0]
        return {} if text is None else {"txt": text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text}
    content = dict(zip(columns, values, strict=True))
    if not set(USUAL_KEYS) & set(content):
        content["captions"] = [one for value in values for one in (value if isinstance(value, list) else [value])]
    try:
        return {"json": json.dumps(content, default=_to_text).encode()}
    except UnicodeDecodeError:
        return {"__no_caption__": b"caption_not_utf8"}


def _to_text(value: Any) -> str:
    """What JSON has no form for. Raises UnicodeDecodeError."""
    return value.decode() if isinstance(value, bytes) else str(value)
