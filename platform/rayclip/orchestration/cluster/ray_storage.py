"""S3 as Ray Train and Ray Tune write to it: pyarrow's interface, with the retries of storage.py below it."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, FileType, PyFileSystem

from rayclip.io import storage
from rayclip.io.paths import S3Path, StoragePath, upload_folder

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that are whole: one that is not in it does not count."""


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


def upload_checkpoint(checkpoint: ray.train.Checkpoint, target: S3Path) -> ray.train.Checkpoint:
    """Copy a checkpoint from this machine, and give it as it is there."""
    upload_folder(Path(checkpoint.path), target, last="state.json")
    return ray.train.Checkpoint(target.key, _filesystem())


def _filesystem() -> FileSystem:
    return PyFileSystem(S3Handler())


class _Upload(io.BytesIO):
    """What is written to it becomes a file in S3 when it is closed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        """Write the file."""
        if not self.closed:
            storage.write_bytes(self._path, self.getvalue())
        super().close()


class S3Handler(FileSystemHandler):
    """Paths are BUCKET/KEY. It holds nothing, credentials least of all: each machine finds its own."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Handler)

    def __hash__(self) -> int:
        return hash(S3Handler)

    def get_type_name(self) -> str:
        """For messages."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """As it is."""
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        """Whether each is a file, a folder or nothing."""
        return [_info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """What lies below a folder. Raises FileNotFoundError for none, unless that is allowed."""
        files = [file for file in storage.list_files(_address(selector.base_dir)) if file.name]
        if not files and not selector.allow_not_found:
            raise FileNotFoundError(selector.base_dir)
        found: dict[str, FileInfo] = {}
        for file in files:
            parts = file.name.split("/")
            for depth in range(1, len(parts) + 1 if selector.recursive else 2):
                path = "/".join([selector.base_dir, *parts[:depth]])
                is_file = depth == len(parts)
                found[path] = FileInfo(path, FileType.File, size=file.size) if is_file else _folder(path)
        return list(found.values())

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a folder comes with its first file."""

    def delete_dir(self, path: str) -> None:
        """Delete all that is below."""
        storage.remove_folder(_address(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete all that is below."""
        storage.remove_folder(_address(path))

    def delete_root_dir_contents(self) -> None:
        """Never: that would be all buckets."""
        raise PermissionError("all buckets are not to be deleted")

    def delete_file(self, path: str) -> None:
        """Delete it."""
        storage.remove(_address(path))

    def move(self, src: str, dest: str) -> None:
        """Copy, and delete what was copied."""
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        """Through this machine."""
        storage.write_bytes(_address(dest), storage.read_bytes(_address(src)))

    def open_input_stream(self, path: str) -> pa.PythonFile:
        """To read from its begin to its end."""
        return pa.PythonFile(storage.open_file(_address(path)), mode="r")

    def open_input_file(self, path: str) -> pa.PythonFile:
        """To read and seek in."""
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        """To write; it is there once it is closed."""
        return pa.PythonFile(_Upload(_address(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        """Never: files in S3 are written whole."""
        raise NotImplementedError("files in S3 cannot be appended to")


def _address(path: str) -> str:
    return f"s3://{path}"


def _folder(path: str) -> FileInfo:
    return FileInfo(path, FileType.Directory)


def _info(path: str) -> FileInfo:
    found = storage.find_file(_address(path))
    if found is not None:
        return FileInfo(path, FileType.File, size=found.size)
    return _folder(path) if S3Path(_address(path)).is_dir() else FileInfo(path, FileType.NotFound)
