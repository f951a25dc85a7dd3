"""From a row of a table to the files of a sample."""

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from rayclip.data.formats.base import IMAGE_EXTENSIONS, PICTURE, Sample
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


def caption_members(columns: Sequence[str], values: Sequence[Any]) -> Sample:
    """One column of text as `txt`, bytes as they are; anything richer as `json`, an object by column."""
    if len(columns) == 1 and isinstance(values[0], bytes | None):
        return {} if values[0] is None else {"txt": values[0]}
    try:
        content = {c: v.decode() if isinstance(v, bytes) else v for c, v in zip(columns, values, strict=True)}
    except UnicodeDecodeError:
        return {"__no_caption__": b"caption_not_utf8"}
    return {"json": json.dumps(content).encode()}
