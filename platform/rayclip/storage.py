"""Files under a path or under `s3://bucket/prefix`, by the same few functions.

S3 is whatever botocore finds: credentials from the environment, a profile or the machine; AWS_ENDPOINT_URL names a
server other than Amazon's. A request that fails for a reason that may pass is made again, after a wait that grows
and is drawn anew each time; a ranged read that takes longer than others do races with a second one (Dean and Barroso,
"The tail at scale", 2013). What cannot be read after that raises StorageError with the file's name.
"""

import asyncio
import io
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from rayclip.pace import Pace

T = TypeVar("T")

_SCHEME = "s3://"
_ATTEMPTS = 7
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0
# A read that is later than others are, or than this, is asked for once more, and given up much later.
_PATIENCE_S, _PATIENT_BYTES_PER_S, _DEADLINE_S = 1.0, 4_000_000, 60.0
_CONNECTIONS = 64
_BLOCK_BYTES = 4 * 2**20  # what a file that is read on and on fetches by one request
_PART_BYTES, _DOWNLOAD_BYTES = 16 * 2**20, 64 * 2**20  # what an upload sends by one request, a download fetches at once
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class StorageError(OSError):
    """A file that cannot be read or written; the message names it."""


class File(NamedTuple):
    """A file that a listing found. `stamp` changes when its content does: an ETag, or the time of the last change."""

    name: str
    size: int
    stamp: str


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address in S3."""
    return str(path).startswith(_SCHEME)


def absolute(path: str | Path) -> str:
    """A path that means the same in any folder; an address already does."""
    return str(path).rstrip("/") if is_remote(path) else str(Path(path).absolute())


def join(folder: str | Path, name: str) -> str:
    """The path of `name` in a folder; a name that is an address or an absolute path stays what it is."""
    if is_remote(name):
        return name
    return f"{str(folder).rstrip('/')}/{name}".rstrip("/") if is_remote(folder) else str(Path(folder) / name)


def told(path: str | Path) -> str:
    """A path as people are told it: from the working folder."""
    return str(path) if is_remote(path) else os.path.relpath(path)


def split(path: str) -> tuple[str, str]:
    """(folder, name) of a file's path."""
    folder, _, name = path.rpartition("/")
    return folder or ".", name


def list_files(folder: str) -> list[File]:
    """Every file below a folder, by its name relative to the folder, in the order of names. Nothing: none."""
    if is_remote(folder):
        return _list_remote(folder)
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


def has_files(address: str) -> bool:
    """Whether there is a file below an address in S3; none, once two listings say so."""
    bucket, _, key = address.removeprefix(_SCHEME).partition("/")
    asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": 1}
    try:
        return any(
            _retried(address, lambda: _client().call_s3("list_objects_v2", **asked)).get("Contents") for _ in range(2)
        )
    except FileNotFoundError:  # the bucket
        return False


def find_file(path: str) -> File | None:
    """The file at a path; None where there is none."""
    try:
        if is_remote(path):
            info = _retried(path, lambda: _client().info(path))
            return None if info["type"] != "file" else File(path, info["size"], str(info["ETag"]).strip('"'))
        status = Path(path).stat()
        return File(path, status.st_size, str(status.st_mtime_ns)) if Path(path).is_file() else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def find_files(paths: list[str]) -> list[File | None]:
    """`find_file` of many."""
    if not any(map(is_remote, paths)):
        return [find_file(path) for path in paths]
    return list(requests().map(find_file, paths))


def read_bytes(path: str) -> bytes:
    """A file's content. Raises FileNotFoundError, and OSError for one that cannot be read."""
    if not is_remote(path):
        return Path(path).read_bytes()
    return _retried(path, lambda: _race(path, None, None))


def read_range(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, by one request. Raises OSError where the file cannot be read that far."""
    if not length:
        return b""
    if is_remote(path):
        return _retried(path, lambda: _whole(path, _race(path, offset, offset + length), length))
    with Path(path).open("rb", buffering=0) as file:
        file.seek(offset)
        return _whole(path, file.read(length), length)


def write_bytes(path: str, data: bytes) -> None:
    """Write a file, whole and then named. Raises StorageError for one in S3 that cannot be written."""
    if is_remote(path):
        _written(path, lambda: _client().pipe_file(path, data))
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


def upload(source: Path, path: str) -> None:
    """Copy a file from disk to S3, a large one in parts of which each is tried again for itself.

    It is there when all of it is, and not before. Raises StorageError.
    """
    size = source.stat().st_size
    if size <= _PART_BYTES:
        write_bytes(path, source.read_bytes())
        return
    bucket, _, key = path.removeprefix(_SCHEME).partition("/")
    there: dict[str, Any] = {"Bucket": bucket, "Key": key}
    begun = _written(path, lambda: _client().call_s3("create_multipart_upload", **there))
    there["UploadId"] = begun["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with source.open("rb") as file:
            file.seek((number - 1) * _PART_BYTES)
            data = file.read(_PART_BYTES)
        sent = _retried(path, lambda: _client().call_s3("upload_part", **there, PartNumber=number, Body=data))
        return {"PartNumber": number, "ETag": sent["ETag"]}

    def complete() -> None:
        try:
            _client().call_s3("complete_multipart_upload", **there, MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # one whose answer was lost has done it
            if (found := find_file(path)) is None or found.size != size:
                raise

    try:
        parts = list(requests().map(send, range(1, -(-size // _PART_BYTES) + 1)))
        _written(path, complete)
    except BaseException:
        with suppress(Exception):  # what is left is not seen, but paid for
            _client().call_s3("abort_multipart_upload", **there)
        raise


def download(path: str, target: Path) -> None:
    """Copy a file from S3 to disk, whole and then named. Raises FileNotFoundError, and StorageError."""
    with open_file(path) as source, whole_local(target) as file:
        while data := source.read(_DOWNLOAD_BYTES):
            file.write(data)


def remove(path: str) -> None:
    """Delete a file, where there is one."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
    elif find_file(path) is not None:
        _retried(path, lambda: _client().rm_file(path))


def remove_folder(path: str) -> None:
    """Delete all files below an address in S3."""
    list(requests().map(remove, [join(path, file.name) for file in list_files(path)]))


def open_file(path: str) -> BinaryIO:
    """A file to read and seek in; one in S3 is fetched a few megabytes at a time. Raises FileNotFoundError."""
    if not is_remote(path):
        return Path(path).open("rb")
    found = find_file(path)
    if found is None:
        raise FileNotFoundError(f"no file at '{path}'")
    return io.BufferedReader(RemoteFile(path, found.size), _BLOCK_BYTES)


class RemoteFile(io.RawIOBase):
    """A file in S3 whose every read is one ranged request."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
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
        starts = range(self._at, end, _BLOCK_BYTES)
        fetch = partial(_read_to, self._path, end)
        data = b"".join(map(fetch, starts) if len(starts) < 2 else requests().map(fetch, starts))
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fetch as much as the buffer holds."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _read_to(path: str, end: int, start: int) -> bytes:
    return read_range(path, start, min(_BLOCK_BYTES, end - start))


_pace = Pace()


def requests() -> ThreadPoolExecutor:
    """The threads of this process that wait for files; what they run must not wait for them in turn."""
    return _requests(os.getpid())


@lru_cache(maxsize=1)
def _requests(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONNECTIONS // 2, thread_name_prefix="storage")


def _client() -> Any:
    return _client_of(os.getpid(), os.environ.get("AWS_ENDPOINT_URL"))


@lru_cache(maxsize=1)
def _client_of(process: int, endpoint: str | None) -> Any:
    from s3fs import S3FileSystem  # takes half a second, and most runs need none

    settings = {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": 5,
        "read_timeout": _DEADLINE_S / 2,
        "max_pool_connections": _CONNECTIONS,
    }
    client = S3FileSystem(
        endpoint_url=endpoint, config_kwargs=settings, use_listings_cache=False, skip_instance_cache=True
    )
    client.retries = 1  # `_retried` does that
    return client


def _retried(path: str, request: Callable[[], T]) -> T:
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0.5, 1) * min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 3 ** (attempt - 1)))
        try:
            return request()
        except _FINAL:
            raise
        except Exception as error:  # botocore's and aiohttp's have no base in common
            last = error
            if type(error.__cause__ or error).__name__ in ("NoCredentialsError", "ParamValidationError"):
                break
    reason = str(last) or type(last).__name__
    raise StorageError(f"'{path}' cannot be reached after {attempt + 1} attempts: {reason}") from last


def _written(path: str, request: Callable[[], T]) -> T:
    try:
        return _retried(path, request)
    except FileNotFoundError:
        raise StorageError(f"'{path}' cannot be written: there is no such bucket") from None
    except PermissionError as error:
        raise StorageError(f"'{path}' cannot be written: {error}") from None


def _whole(path: str, data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise StorageError(f"'{path}' ends inside a chunk: {len(data)} of {length} bytes")
    return data


def _race(path: str, start: int | None, end: int | None) -> bytes:
    """What the first of at most two requests answers. How long a whole file takes nobody knows."""
    from fsspec.asyn import sync

    client, num_bytes, began = _client(), (end or 0) - (start or 0), time.monotonic()
    most_s = _PATIENCE_S + num_bytes / _PATIENT_BYTES_PER_S
    patience_s = _pace.patience_s(num_bytes, most_s) if num_bytes else most_s

    def ask() -> "asyncio.Task[bytes]":
        return asyncio.ensure_future(client._cat_file(path, start=start, end=end, max_concurrency=1))

    async def race() -> bytes:
        asked = [ask()]
        try:
            await asyncio.wait(asked, timeout=patience_s)
            if not asked[0].done():
                asked.append(ask())
                await asyncio.wait(asked, timeout=_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            done = [request for request in asked if request.done()]
            if not done:
                raise TimeoutError(f"no answer within {_DEADLINE_S:.0f} s")
            return min(done, key=lambda request: request.exception() is not None).result()
        finally:
            for request in asked:
                request.cancel()

    data: bytes = sync(client.loop, race)
    if num_bytes:
        _pace.add(time.monotonic() - began, num_bytes)
    return data


def _list_remote(folder: str) -> list[File]:
    """A listing that is short, for whatever reason, would leave out shards without a word: two must agree."""

    def once() -> list[File]:
        found = _client().find(folder, detail=True, maxdepth=None)
        start = len(folder.removeprefix(_SCHEME).rstrip("/")) + 1
        return sorted(File(name[start:], i["size"], str(i["ETag"]).strip('"')) for name, i in found.items())

    def agreeing() -> list[File]:
        first, second = (_retried(folder, once) for _ in range(2))
        if first != second:
            raise StorageError(f"two listings of '{folder}' differ")
        return second

    return _retried(folder, agreeing)
