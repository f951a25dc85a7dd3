"""S3 as Ray Train and Ray Tune write to it: a file system of fsspec's, with the retries of storage.py below it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from fsspec import AbstractFileSystem
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from rayclip.io import storage
from rayclip.io.paths import RemotePath, StoragePath, upload_folder


def ray_storage(folder: StoragePath) -> dict[str, Any]:
    """The arguments by which Ray keeps a run in a folder: it is called NAME, and lies at the storage's path."""
    if isinstance(folder, Path):
        return {"name": folder.name, "storage_path": str(folder.parent)}
    return {"name": folder.name, "storage_path": folder.parent.key, "storage_filesystem": _filesystem()}


def train_result(folder: StoragePath) -> ray.train.Result:
    """What Ray Train keeps in a run's folder."""
    if isinstance(folder, Path):
        return ray.train.Result.from_path(str(folder))
    return ray.train.Result.from_path(folder.key, _filesystem())


def upload_checkpoint(
    checkpoint: ray.train.Checkpoint, target: RemotePath, check: Callable[[], None]
) -> ray.train.Checkpoint:
    """Copy a checkpoint from this machine, and give it as it is there; `check` is called before each file."""
    upload_folder(Path(checkpoint.path), target, last="state.json", check=check)
    return ray.train.Checkpoint(target.key, _filesystem())


def _filesystem() -> FileSystem:
    return PyFileSystem(FSSpecHandler(S3FileSystem()))


class _Upload(io.BytesIO):
    """What is written to it becomes a file in S3 when it is closed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        """Write what was given to it as a file in S3."""
        if not self.closed:
            storage.write_bytes(self._path, self.getvalue())
        super().close()


class S3FileSystem(AbstractFileSystem):
    """Files at BUCKET/KEY, written whole. It holds nothing, credentials least of all: each machine finds its own."""

    protocol = "s3"
    cachable = False  # there is nothing in it to share

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3FileSystem)

    def __hash__(self) -> int:
        return hash(S3FileSystem)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Describe a file or a folder. Raises FileNotFoundError."""
        found = storage.find_file(_address(path))
        if found is None and not RemotePath(_address(path)).is_dir():
            raise FileNotFoundError(path)
        return _entry(path, found)

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **options: Any
    ) -> dict[str, dict[str, Any]] | list[str]:
        """List what lies below a folder by one listing, however deep it is."""
        found = {}
        for file in storage.list_files(_address(path)):
            parts = file.name.split("/")
            for depth in range(1, min(len(parts), maxdepth or len(parts)) + 1):
                if withdirs or depth == len(parts):
                    name = "/".join([path, *parts[:depth]])
                    found[name] = _entry(name, file if depth == len(parts) else None)
        return found if detail else list(found)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """List what lies in a folder."""
        found = self.find(path, maxdepth=1, withdirs=True, detail=True)
        assert isinstance(found, dict)
        return list(found.values() if detail else found)

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        """Do nothing: a folder comes with its first file."""

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete a file, or all that is below a folder; never all of a bucket."""
        if "/" not in path.strip("/"):
            raise PermissionError(f"bucket '{path}' is not to be deleted")
        (storage.remove_folder if recursive else storage.remove)(_address(path))

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        """Copy a file, through this machine."""
        storage.write_bytes(_address(path2), storage.read_bytes(_address(path1)))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "ab":
            raise NotImplementedError("files in S3 cannot be appended to")
        return _Upload(_address(path)) if mode == "wb" else storage.open_file(_address(path))


def _address(path: str) -> str:
    return f"s3://{path}"


def _entry(path: str, file: storage.File | None) -> dict[str, Any]:
    kind = "directory" if file is None else "file"
    return {"name": path, "size": file.size if file else None, "type": kind}
