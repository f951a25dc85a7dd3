"""Paths of folders and files on disk or in a store, with the part of pathlib's methods that both have.

A path in a store is no PathLike: code that does not know stores refuses it, and makes no folder called "s3:".
"""

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Union

from rayclip.io import read_only, s3, storage
from rayclip.io.patterns import is_like


@dataclass(frozen=True, order=True)
class RemotePath:
    """An address, as s3://BUCKET/KEY. A folder is there where a file below it is."""

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.address}/{name}")

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The folder that it lies in."""
        return RemotePath(self.address.rpartition("/")[0])

    @property
    def stem(self) -> str:
        """The name without what follows its last dot."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def key(self) -> str:
        """BUCKET/KEY."""
        return self.address.removeprefix("s3://")

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is a file."""
        return storage.find_file(self.address) is not None

    def is_dir(self) -> bool:
        """Whether there is a file below it."""
        return storage.has_files(self.address)

    def iterdir(self) -> Iterator["RemotePath"]:
        """What lies in the folder, by name."""
        names = (file.name.partition("/")[0] for file in storage.list_files(self.address))
        return (self / name for name in dict.fromkeys(names) if name)

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Files whose names, part by part, are like the pattern's, by name."""
        wanted = pattern.split("/")
        for file in storage.list_files(self.address):
            if is_like(file.name, wanted):
                yield self / file.name

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, to read and seek in."""
        assert mode == "rb", "files in stores are written whole, by files.whole_file"
        return storage.open_file(self.address)

    def read_bytes(self) -> bytes:
        """The file's content. Raises FileNotFoundError."""
        return storage.read_bytes(self.address)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The file's content. Raises FileNotFoundError."""
        return self.read_bytes().decode(encoding)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder comes with its first file."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file, where there is one."""
        storage.remove(self.address)


StoragePath = Union[Path, RemotePath]  # noqa: UP007 (read at import, where a class has no "or" with a string)


def storage_path(path: str | StoragePath) -> StoragePath:
    """Return the absolute path that a path or an address names."""
    absolute = storage.absolute(str(path))
    return RemotePath(absolute) if storage.is_remote(absolute) else Path(absolute)


def matching(folder: StoragePath, pattern: str) -> list[StoragePath]:
    """Files below a folder whose names are like the pattern's, by name."""
    return [folder / name for name in sorted(str(found)[len(str(folder)) + 1 :] for found in folder.glob(pattern))]


def to_read(file: StoragePath) -> Path | BinaryIO:
    """What libraries read a file from: its path, or the content of one in S3."""
    return file if isinstance(file, Path) else io.BytesIO(file.read_bytes())


def size_of(file: StoragePath) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    found = storage.find_file(str(file))
    if found is None:
        raise FileNotFoundError(f"no file at '{file}'")
    return found.size


def append(file: StoragePath, data: bytes) -> int:
    """Add to a file, which only one process does at a time; its bytes then."""
    if isinstance(file, Path):
        with file.open("ab") as target:
            target.write(data)
            return target.tell()
    whole = (file.read_bytes() if file.is_file() else b"") + data
    storage.write_bytes(str(file), whole)
    return len(whole)


def remove_tree(folder: StoragePath) -> None:
    """Delete a folder with all that is in it, where there is one."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        storage.remove_folder(str(folder))


def upload_folder(
    source: Path, target: RemotePath, last: str | None = None, check: Callable[[], None] = lambda: None
) -> None:
    """Copy a folder's files to S3; the one named `last`, by which the others count, after all others.

    `check` is called before each, and may raise.
    """
    read_only.check_writable(str(target))
    names = [file.name for file in storage.list_files(str(source))]
    for name in sorted(names, key=lambda name: name == last):
        check()
        s3.upload(source / name, str(target / name))


@contextmanager
def local_copy(found: StoragePath) -> Iterator[Path]:
    """A folder, or a file, on this machine: itself, or a copy that goes when the block ends."""
    if isinstance(found, Path):
        yield found
        return
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / found.name
        for file in storage.list_files(str(found)):
            storage.download(storage.join(str(found), file.name), target / file.name)
        yield target


@contextmanager
def staged(target: StoragePath, last: str | None = None) -> Iterator[Path]:
    """A folder on this machine to write to: itself, or one that is copied to S3 when the block ends well."""
    if isinstance(target, Path):
        yield target
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        upload_folder(folder, target, last)
