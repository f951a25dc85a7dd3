"""Files on disk, in S3, and in the stores that are only read (`read_only`), by the same few functions."""

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rayclip.io import read_only, s3
from rayclip.io.s3 import File

BLOCK_BYTES = 4 * 2**20
"""What a file that is read on and on fetches by one request."""
_DOWNLOAD_BYTES = 64 * 2**20  # what a download fetches at once


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address, in S3 or in a store that is only read."""
    return str(path).startswith(s3.SCHEME) or bool(read_only.scheme_of(str(path)))


def is_s3(path: str | Path) -> bool:
    """Whether a path is an address in S3."""
    return str(path).startswith(s3.SCHEME)


def _store(path: str) -> Any:
    """The module that speaks with the store of an address."""
    return s3 if is_s3(path) else read_only


def absolute(path: str | Path) -> str:
    """A path that means the same in any folder; an address already does.

    Raises UserError for the address of a store whose package is not installed, with the extra that brings it.
    """
    if read_only.scheme_of(str(path)):
        read_only.check_readable(str(path))
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
        files: list[File] = _store(folder).list_files(folder)
        return files
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
            there: File = _store(path).find_file(path)
            return there
        status = Path(path).stat()
        return File(path, status.st_size, str(status.st_mtime_ns)) if Path(path).is_file() else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def has_files(folder: str) -> bool:
    """Whether there is a file below an address."""
    return s3.has_files(folder) if is_s3(folder) else bool(list_files(folder))


def find_files(paths: list[str]) -> list[File | None]:
    """Return what `find_file` gives for each path; of files in S3 many are asked for at once."""
    if not any(map(is_remote, paths)):
        return [find_file(path) for path in paths]
    return list(s3.requests().map(find_file, paths))


def read_bytes(path: str) -> bytes:
    """A file's content. Raises FileNotFoundError, and OSError for one that cannot be read."""
    if not is_remote(path):
        return Path(path).read_bytes()
    data: bytes = _store(path).read_bytes(path)
    return data


def read_range(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, by one request. Raises OSError where the file cannot be read that far."""
    if not length:
        return b""
    if is_remote(path):
        data: bytes = _store(path).read_range(path, offset, length)
        return data
    with Path(path).open("rb", buffering=0) as file:
        file.seek(offset)
        return s3.whole(path, file.read(length), length)


def write_bytes(path: str, data: bytes) -> None:
    """Write a file, whole and then named. Raises StorageError for one in S3 that cannot be written, and UserError."""
    read_only.check_writable(path)
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
    """Copy a file from a store to disk, whole and then named. Raises FileNotFoundError, and StorageError."""
    with open_file(path) as source, whole_local(target) as file:
        while data := source.read(_DOWNLOAD_BYTES):
            file.write(data)


def remove(path: str) -> None:
    """Delete a file, where there is one."""
    read_only.check_writable(path)
    if is_remote(path):
        s3.remove(path)
    else:
        Path(path).unlink(missing_ok=True)


def remove_folder(path: str) -> None:
    """Delete all files below an address in S3."""
    list(s3.requests().map(remove, [join(path, file.name) for file in list_files(path)]))


def open_file(path: str) -> BinaryIO:
    """A file to read and seek in; one in a store is fetched a few megabytes at a time. Raises FileNotFoundError."""
    if not is_remote(path):
        return Path(path).open("rb")
    found = find_file(path)
    if found is None:
        raise FileNotFoundError(f"no file at '{path}'")
    return io.BufferedReader(RemoteFile(path, found.size), BLOCK_BYTES)


class RemoteFile(io.RawIOBase):
    """A file in a store whose every read is one ranged request."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: any byte can be asked for."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; nothing is fetched."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Fetch up to `size` bytes; many of them by several requests at once."""
        left = max(0, self._size - self._at)
        end = self._at + (left if size < 0 else min(size, left))
        starts = range(self._at, end, BLOCK_BYTES)
        fetch = partial(_read_to, self._path, end)
        data = b"".join(map(fetch, starts) if len(starts) < 2 else s3.requests().map(fetch, starts))
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fetch as much as the buffer holds."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _read_to(path: str, end: int, start: int) -> bytes:
    return read_range(path, start, min(BLOCK_BYTES, end - start))
