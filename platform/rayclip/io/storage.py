"""Files under a path or under `s3://bucket/prefix`, by the same few functions."""

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rayclip.errors import UserError
from rayclip.io import s3
from rayclip.io.s3 import File

_OTHER_STORES = ("gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https")
_DOWNLOAD_BYTES = 64 * 2**20  # what a download fetches at once


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address in S3."""
    return str(path).startswith(s3.SCHEME)


def absolute(path: str | Path) -> str:
    """A path that means the same in any folder; an address already does.

    Raises UserError for the address of a store that is not read, which would be taken for a folder of that name.
    """
    scheme, found, _ = str(path).partition("://")
    if found and scheme.lower() in _OTHER_STORES:
        raise UserError(
            f"'{path}': {scheme}:// is not read; give a path on disk or s3://BUCKET/KEY (of another store that speaks "
            "S3's protocol with AWS_ENDPOINT_URL), or copy the files there"
        )
    return str(path).rstrip("/") if is_remote(path) else str(Path(path).absolute())


def join(folder: str | Path, name: str) -> str:
    """The path of `name` in a folder; a name that is an address or an absolute path stays what it is."""
    if is_remote(name):
        return name
    return f"{str(folder).rstrip('/')}/{name}".rstrip("/") if is_remote(folder) else str(Path(folder) / name)


def format_path(path: str | Path) -> str:
    """A path as people are told it: from the working folder."""
    return str(path) if is_remote(path) else os.path.relpath(path)


def split(path: str) -> tuple[str, str]:
    """(folder, name) of a file's path."""
    folder, _, name = path.rpartition("/")
    return folder or ".", name


def list_files(folder: str) -> list[File]:
    """Every file below a folder, by its name relative to the folder, in the order of names. Nothing: none."""
    if is_remote(folder):
        return s3.list_files(folder)
    found = []
    for inner, _, names in os.walk(folder, followlinks=True):
        prefix = os.path.relpath(inner, folder)
        for name in names:
            try:
                status = Path(inner, name).stat()
            except OSError:  # a link to nothing, or a file that went meanwhile
                continue
            relative = name if prefix == "." else f"{prefix}/{name}"
            found.append(File(relative, status.st_size, str(status.st_mtime_ns)))
    return sorted(found)


def find_file(path: str) -> File | None:
    """The file at a path; None where there is none."""
    try:
        if is_remote(path):
            return s3.find_file(path)
        status = Path(path).stat()
        return File(path, status.st_size, str(status.st_mtime_ns)) if Path(path).is_file() else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def find_files(paths: list[str]) -> list[File | None]:
    """Return what `find_file` gives for each path; of files in S3 many are asked for at once."""
    if not any(map(is_remote, paths)):
        return [find_file(path) for path in paths]
    return list(s3.requests().map(find_file, paths))


def read_bytes(path: str) -> bytes:
    """A file's content. Raises FileNotFoundError, and OSError for one that cannot be read."""
    return s3.read_bytes(path) if is_remote(path) else Path(path).read_bytes()


def read_range(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, by one request. Raises OSError where the file cannot be read that far."""
    if not length:
        return b""
    if is_remote(path):
        return s3.read_range(path, offset, length)
    with Path(path).open("rb", buffering=0) as file:
        file.seek(offset)
        return s3.whole(path, file.read(length), length)


def write_bytes(path: str, data: bytes) -> None:
    """Write a file, whole and then named. Raises StorageError for one in S3 that cannot be written."""
    if is_remote(path):
        s3.write_bytes(path, data)
        return
    with whole_local(Path(path)) as target:
        target.write(data)


@contextmanager
def whole_local(path: Path) -> Iterator[BinaryIO]:
    """A file on disk to write to; it takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two attempts at one task may overlap when a worker is lost: each writes to a file of its own.
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as target:
            yield target
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def download(path: str, target: Path) -> None:
    """Copy a file from S3 to disk, whole and then named. Raises FileNotFoundError, and StorageError."""
    with open_file(path) as source, whole_local(target) as file:
        while data := source.read(_DOWNLOAD_BYTES):
            file.write(data)


def remove(path: str) -> None:
    """Delete a file, where there is one."""
    if is_remote(path):
        s3.remove(path)
    else:
        Path(path).unlink(missing_ok=True)


def remove_folder(path: str) -> None:
    """Delete all files below an address in S3."""
    list(s3.requests().map(remove, [join(path, file.name) for file in list_files(path)]))


def open_file(path: str) -> BinaryIO:
    """A file to read and seek in; one in S3 is fetched a few megabytes at a time. Raises FileNotFoundError."""
    if not is_remote(path):
        return Path(path).open("rb")
    found = find_file(path)
    if found is None:
        raise FileNotFoundError(f"no file at '{path}'")
    return io.BufferedReader(s3.RemoteFile(path, found.size), s3.BLOCK_BYTES)
