"""A small file of JSON, on disk or in S3, that several processes write: each on condition that it is as it was read.

On disk the file is looked at and replaced under flock; in S3 it is written by If-None-Match and If-Match. Of several
that write at once exactly one succeeds; the others get ChangedError.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rayclip.io import s3
from rayclip.io.paths import RemotePath, StoragePath
from rayclip.io.s3 import ChangedError, StorageError


class Found(NamedTuple):
    """The file's content, and what tells it from any other: what `replace` and `remove` compare."""

    record: dict[str, Any]
    version: str


class ConditionalFile(Protocol):
    """The file. Every write is on condition that it is as it was read."""

    def read(self) -> Found | None:
        """The record with its version; None where there is none."""

    def create(self, data: bytes) -> str:
        """Write where there is no file; the version. Raises ChangedError."""

    def replace(self, data: bytes, version: str) -> str:
        """Write where the file is still of this version; the new version. Raises ChangedError."""

    def remove(self, version: str) -> None:
        """Delete the file where it is still of this version."""


def conditional_file(path: StoragePath, lock_name: str) -> ConditionalFile:
    """Return the file at a path; on disk one named `lock_name` beside it is locked while it is written."""
    return _S3File(path) if isinstance(path, RemotePath) else _DiskFile(path, path.with_name(lock_name))


def encode(record: dict[str, Any]) -> bytes:
    """Return a record as the file's content."""
    return (json.dumps(record) + "\n").encode()


def _parse(data: bytes) -> dict[str, Any]:
    """A record; one that cannot be read is of a holder that nobody can see."""
    try:
        record = json.loads(data)
        return record if isinstance(record, dict) else {}
    except ValueError:
        return {}


class _DiskFile:
    """A version is the content: each has an id and a count of its own."""

    def __init__(self, path: Path, lock: Path) -> None:
        self._path, self._lock = path, lock
        self._made: list[Path] = []

    def read(self) -> Found | None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        return Found(_parse(data), data.decode(errors="replace"))

    def create(self, data: bytes) -> str:
        self._made = [folder for folder in self._path.parents if not folder.exists()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._swap(data, None)

    def replace(self, data: bytes, version: str) -> str:
        return self._swap(data, version)

    def remove(self, version: str) -> None:
        with self._locked() as lock:
            found = self.read()
            if found is not None and found.version == version:
                self._path.unlink()
                lock.unlink()  # whoever waits for it sees that it is gone, and makes another
        for folder in self._made:  # a job that failed before it wrote anything leaves nothing
            with suppress(OSError):
                folder.rmdir()

    def _swap(self, data: bytes, version: str | None) -> str:
        with self._locked() as lock:
            found = self.read()
            if (found and found.version) != version:
                if found is None:
                    lock.unlink()  # with nothing to lock it is a file that nobody removes
                raise ChangedError(str(self._path))
            partial = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}")
            partial.write_bytes(data)
            partial.replace(self._path)
        return data.decode()

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        """The lock file is locked, by the kernel, which lets go of it when the process dies."""
        import fcntl  # not on Windows, where there is no Ray cluster either

        lock = self._lock
        is_there = False
        while True:
            try:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                raise ChangedError(f"'{lock.parent}' is gone") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    is_there = os.path.samestat(os.fstat(descriptor), lock.stat())
                if is_there:
                    yield lock
                    return
            finally:
                os.close(descriptor)


class _S3File:
    """A version is the file's ETag."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path

    def read(self) -> Found | None:
        try:
            data, tag = s3.read_tagged(str(self._path))
        except FileNotFoundError:
            return None
        return Found(_parse(data), tag)

    def create(self, data: bytes) -> str:
        return self._mine(data, lambda: s3.write_if(str(self._path), data, None))

    def replace(self, data: bytes, version: str) -> str:
        return self._mine(data, lambda: s3.write_if(str(self._path), data, version))

    def remove(self, version: str) -> None:
        with suppress(ChangedError, StorageError):
            s3.remove_if(str(self._path), version)

    def _mine(self, data: bytes, write: Callable[[], str]) -> str:
        """A write whose answer was lost is refused when it is tried again: then what lies there is what was written."""
        try:
            return write()
        except ChangedError:
            found = self.read()
            if found is not None and found.record == _parse(data):
                return found.version
            raise
