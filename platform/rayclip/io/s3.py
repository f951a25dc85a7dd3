"""What S3 is asked, and how often.

It is whatever botocore finds: credentials from the environment, a profile or the machine; AWS_ENDPOINT_URL names a
server other than Amazon's. A request that fails for a reason that may pass is made again, after a wait that grows
and is drawn anew each time; a ranged read that takes longer than others do races with a second one (Dean and Barroso,
"The tail at scale", 2013). What cannot be read after that raises StorageError with the file's name.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rayclip.io.latency import LatencyEstimator

T = TypeVar("T")

SCHEME = "s3://"
_ATTEMPTS = 7
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0
# A read that is later than others are, or than this, is asked for once more, and given up much later.
_PATIENCE_S, _PATIENT_BYTES_PER_S, _DEADLINE_S = 1.0, 4_000_000, 60.0
_CONNECTIONS = 64
_PART_BYTES = 16 * 2**20  # what an upload sends by one request
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class StorageError(OSError):
    """A file that cannot be read or written; the message names it."""


class ChangedError(StorageError):
    """A file is not, or not any more, as a conditional write wants it."""


class File(NamedTuple):
    """A file that a listing found. `stamp` changes when its content does: an ETag, or the time of the last change."""

    name: str
    size: int
    stamp: str


def list_files(folder: str) -> list[File]:
    """Every file below an address, by its name relative to it, in the order of names.

    A listing that is short, for whatever reason, would leave out shards without a word: two must agree.
    """

    def once() -> list[File]:
        found = client().find(folder, detail=True, maxdepth=None)
        start = len(folder.removeprefix(SCHEME).rstrip("/")) + 1
        return sorted(File(name[start:], i["size"], str(i["ETag"]).strip('"')) for name, i in found.items())

    def agreeing() -> list[File]:
        first, second = (retried(folder, once) for _ in range(2))
        if first != second:
            raise StorageError(f"two listings of '{folder}' differ")
        return second

    return retried(folder, agreeing)


def has_files(address: str) -> bool:
    """Whether there is a file below an address in S3; none, once two listings say so."""
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": 1}
    try:
        return any(
            retried(address, lambda: client().call_s3("list_objects_v2", **asked)).get("Contents") for _ in range(2)
        )
    except FileNotFoundError:  # the bucket
        return False


def find_file(path: str) -> File:
    """The file at an address. Raises FileNotFoundError."""
    info = retried(path, lambda: client().info(path))
    if info["type"] != "file":
        raise FileNotFoundError(f"no file at '{path}'")
    return File(path, info["size"], str(info["ETag"]).strip('"'))


def read_bytes(path: str) -> bytes:
    """A file's content. Raises FileNotFoundError and StorageError."""
    return retried(path, lambda: _race(path, None, None))


def read_range(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, by one request. Raises OSError where the file cannot be read that far."""
    return retried(path, lambda: whole(path, _race(path, offset, offset + length), length))


def write_bytes(path: str, data: bytes) -> None:
    """Write a file, which is there when all of it is. Raises StorageError."""
    _written(path, lambda: client().pipe_file(path, data))


def upload(source: Path, path: str) -> None:
    """Copy a file from disk to S3, a large one in parts of which each is tried again for itself.

    It is there when all of it is, and not before. Raises StorageError.
    """
    size = source.stat().st_size
    if size <= _PART_BYTES:
        write_bytes(path, source.read_bytes())
        return
    there: dict[str, Any] = {**_address(path)}
    begun = _written(path, lambda: client().call_s3("create_multipart_upload", **there))
    there["UploadId"] = begun["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with source.open("rb") as file:
            file.seek((number - 1) * _PART_BYTES)
            data = file.read(_PART_BYTES)
        sent = retried(path, lambda: client().call_s3("upload_part", **there, PartNumber=number, Body=data))
        return {"PartNumber": number, "ETag": sent["ETag"]}

    def complete() -> None:
        try:
            client().call_s3("complete_multipart_upload", **there, MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # one whose answer was lost has done it
            if find_file(path).size != size:
                raise

    try:
        parts = list(requests().map(send, range(1, -(-size // _PART_BYTES) + 1)))
        _written(path, complete)
    except BaseException:
        with suppress(Exception):  # what is left is not seen, but paid for
            client().call_s3("abort_multipart_upload", **there)
        raise


def read_tagged(path: str) -> tuple[bytes, str]:
    """A small file's content with its ETag, of one moment. Raises FileNotFoundError and StorageError."""

    def once() -> tuple[bytes, str]:
        from fsspec.asyn import sync

        async def ask() -> tuple[bytes, str]:
            answer = await client()._call_s3("get_object", **_address(path))
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"]

        return sync(client().loop, ask)

    return retried(path, once)


def write_if(path: str, data: bytes, tag: str | None) -> str:
    """Write a file that has this ETag, or, with None, where there is none; its new ETag.

    Raises ChangedError where that is not so. One whose answer was lost on the way, and that was tried again, raises it
    too: what lies there then is `data`.
    """
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    return _conditional(path, "put_object", Body=data, **condition)["ETag"]


def remove_if(path: str, tag: str) -> None:
    """Delete a file that has this ETag. Raises ChangedError where it has another."""
    _conditional(path, "delete_object", IfMatch=tag)


def _conditional(path: str, request: str, **asked: Any) -> dict[str, Any]:
    def once() -> dict[str, Any]:
        try:
            return client().call_s3(request, **_address(path), **asked)
        except FileExistsError as error:  # what s3fs makes of 412
            raise ChangedError(path) from error
        except FileNotFoundError as error:
            if "IfMatch" in asked:
                raise ChangedError(path) from error
            raise
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
                raise ChangedError(path) from error
            raise

    return _written(path, once)


def _address(path: str) -> dict[str, str]:
    bucket, _, key = path.removeprefix(SCHEME).partition("/")
    return {"Bucket": bucket, "Key": key}


def remove(path: str) -> None:
    """Delete a file, where there is one."""
    with suppress(FileNotFoundError):
        find_file(path)
        retried(path, lambda: client().rm_file(path))


_latency = LatencyEstimator()


def requests() -> ThreadPoolExecutor:
    """The threads of this process that wait for files; what they run must not wait for them in turn."""
    return _requests(os.getpid())


@lru_cache(maxsize=1)
def _requests(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONNECTIONS // 2, thread_name_prefix="storage")


def client() -> Any:
    """S3, as this process is told of it."""
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
    client.retries = 1  # `retried` does that
    return client


def retried(path: str, request: Callable[[], T]) -> T:
    """The answer to a request, which is made again where it fails for a reason that may pass. Raises StorageError."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0.5, 1) * min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 3 ** (attempt - 1)))
        try:
            return request()
        except (*_FINAL, ChangedError):
            raise
        except Exception as error:  # botocore's and aiohttp's have no base in common
            last = error
            if type(error.__cause__ or error).__name__ in ("NoCredentialsError", "ParamValidationError"):
                break
    reason = str(last) or type(last).__name__
    raise StorageError(f"'{path}' cannot be reached after {attempt + 1} attempts: {reason}") from last


def _written(path: str, request: Callable[[], T]) -> T:
    try:
        return retried(path, request)
    except FileNotFoundError:
        raise StorageError(f"'{path}' cannot be written: there is no such bucket") from None
    except PermissionError as error:
        raise StorageError(f"'{path}' cannot be written: {error}") from None


def whole(path: str, data: bytes, length: int) -> bytes:
    """The bytes, where they are as many as there should be. Raises StorageError."""
    if len(data) != length:
        raise StorageError(f"'{path}' ends inside a chunk: {len(data)} of {length} bytes")
    return data


def _race(path: str, start: int | None, end: int | None) -> bytes:
    """What the first of at most two requests answers. How long a whole file takes nobody knows."""
    from fsspec.asyn import sync

    filesystem, num_bytes, began = client(), (end or 0) - (start or 0), time.monotonic()
    most_s = _PATIENCE_S + num_bytes / _PATIENT_BYTES_PER_S
    timeout_s = _latency.timeout_s(num_bytes, most_s) if num_bytes else most_s

    def ask() -> "asyncio.Task[bytes]":
        return asyncio.ensure_future(filesystem._cat_file(path, start=start, end=end, max_concurrency=1))

    async def race() -> bytes:
        asked = [ask()]
        try:
            await asyncio.wait(asked, timeout=timeout_s)
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

    data: bytes = sync(filesystem.loop, race)
    if num_bytes:
        _latency.add(time.monotonic() - began, num_bytes)
    return data
