"""Files, on disk or in S3, that get their names only when all of them is there: a crash leaves the old one, or none."""

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rayclip.errors import UserError
from rayclip.io import read_only, s3, storage
from rayclip.io.paths import StoragePath, staged


@contextmanager
def whole_file(path: StoragePath) -> Iterator[BinaryIO]:
    """A file to write to; it takes the place of `path` when the block ends well."""
    if isinstance(path, Path):
        with storage.whole_local(path) as target:
            yield target
        return
    read_only.check_writable(str(path))
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / path.name
        with written.open("wb") as target:
            yield target
        s3.upload(written, str(path))


@contextmanager
def whole_folder(folder: StoragePath, last: str) -> Iterator[Path]:
    """A new folder on this machine to write to; it is copied to `folder`, or gets its name, when the block ends well.

    In S3 the file named `last` comes last: without it there is nothing of use in the folder.
    """
    if not isinstance(folder, Path):
        with staged(folder, last) as partial:
            yield partial
        return
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise UserError(f"'{folder}' has been written by another process meanwhile") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: StoragePath, text: str) -> None:
    """Write text, whole and then named."""
    with whole_file(path) as target:
        target.write(text.encode())


def write_json(path: StoragePath, content: dict[str, Any]) -> None:
    """Write JSON, whole and then named."""
    write_text(path, json.dumps(content, indent=2) + "\n")


SETTINGS_BESIDE = {
    "model.safetensors": "config.json",
    "open_clip_model.safetensors": "open_clip_config.json",
    "pytorch_model.bin": "config.json",
    "open_clip_pytorch_model.bin": "open_clip_config.json",
}
"""Names of files with weights, the preferred first, and of the file beside them that says what model they are of."""


def find_weights(path: Path) -> Path | None:
    """The file with weights that a path names: itself, or the first that the folder holds; None where there is none."""
    if path.is_file():
        return path
    return next((path / name for name in SETTINGS_BESIDE if (path / name).is_file()), None)


def describe_impostor(start: bytes) -> str | None:
    """What a file is that stands in the place of another, by its first bytes; None where it may be the file itself."""
    head = start[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer in the file's place: fetch the file with git lfs pull"
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page: what was downloaded was a page about the file, or an error"
    return None
