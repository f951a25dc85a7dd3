"""Stores that are read, and not written to: Google's, Azure's, the Hugging Face Hub, and web servers, through fsspec.

gs://BUCKET/KEY, az://CONTAINER/KEY, hf://datasets/OWNER/NAME@REVISION/FILE, https://HOST/FILE. Credentials are those
that the store's own library finds. A web server lists what its page of a folder links to, where it has such a page.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from rayclip.errors import UserError
from rayclip.io.s3 import File, StorageError, requests, retried, whole

T = TypeVar("T")


class _Store(NamedTuple):
    package: str
    extra: str
    options: dict[str, Any]


_LISTED_ANEW = {"use_listings_cache": False}
_HTTP = _Store(
    "aiohttp",
    "",
    # Names are encoded on the way; a file that is packed for the way would have no parts to ask for.
    {
        "encoded": False,
        "client_kwargs": {"trust_env": True, "headers": {"Accept-Encoding": "identity"}},
        **_LISTED_ANEW,
    },
)
_GOOGLE, _AZURE = _Store("gcsfs", "gcs", _LISTED_ANEW), _Store("adlfs", "azure", _LISTED_ANEW)
_STORES = {
    "gs": _GOOGLE,
    "gcs": _GOOGLE,
    "az": _AZURE,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "hf": _Store("huggingface_hub", "hf", {}),
    "http": _HTTP,
    "https": _HTTP,
}
_STAMPS = ("ETag", "etag", "generation", "blob_id", "Content-MD5", "Digest", "Last-Modified", "last_modified")
"""Keys under which stores say what changes when a file's content does, the surest first."""
ENVIRONMENT = ("HF_ENDPOINT", "STORAGE_EMULATOR_HOST", "AZURE_STORAGE_ACCOUNT_NAME")
"""What says in the environment where these stores are, without credentials."""


def scheme_of(path: str) -> str:
    """The scheme of an address in one of these stores; empty for any other path."""
    scheme, found, _ = path.partition("://")
    return scheme.lower() if found and scheme.lower() in _STORES else ""


def is_web(path: str) -> bool:
    """Whether it is an address on a web server, which cannot be counted on to list its files."""
    return scheme_of(path) in ("http", "https")


def check_readable(path: str) -> None:
    """Raise UserError where the package that reads the store is not installed."""
    store = _STORES[scheme_of(path)]
    if find_spec(store.package) is None:
        raise UserError(f"'{path}': {scheme_of(path)}:// needs {store.package}: pip install 'rayclip[{store.extra}]'")


def check_writable(path: str, hint: str = "give a path on disk, or s3://BUCKET/KEY") -> None:
    """Raise UserError for an address in one of these stores."""
    if scheme := scheme_of(path):
        raise UserError(f"'{path}': {scheme}:// is read, not written to: {hint}")


def list_files(folder: str) -> list[File]:
    """Every file below an address, by its name relative to it, in the order of names; a file is listed as "" itself."""
    try:
        found = retried(folder, lambda: _ask(folder, lambda fs: fs.find(_key(folder), detail=True, **_refresh(folder))))
    except FileNotFoundError:
        return []
    start = len(_key(folder).rstrip("/")) + 1
    if is_web(folder):
        linked = _sized(folder, [name[start:] for name in found if name[:start] == f"{folder.rstrip('/')}/"])
        itself = None if linked else _there(folder)
        return linked if itself is None else [itself._replace(name="")]
    return sorted(
        File(name[start:], info["size"], _stamp(info)) for name, info in found.items() if info["type"] == "file"
    )


def _sized(folder: str, names: list[str]) -> list[File]:
    """The files that a page links to; a link with a question is one that sorts the page."""
    plain = sorted({name for name in names if name and "?" not in name and not name.endswith("/")})
    found = requests().map(lambda name: _there(f"{folder.rstrip('/')}/{name}"), plain)
    return [file._replace(name=name) for name, file in zip(plain, found, strict=True) if file is not None]


def _there(path: str) -> File | None:
    try:
        return find_file(path)
    except FileNotFoundError:
        return None


def find_file(path: str) -> File:
    """The file at an address; a page of a web server is none. Raises FileNotFoundError."""
    info = retried(path, lambda: _ask(path, lambda fs: fs.info(_key(path))))
    if info["type"] != "file" or (is_web(path) and info.get("mimetype") == "text/html"):
        raise FileNotFoundError(f"no file at '{path}'")
    if info["size"] is None:
        raise StorageError(f"'{path}': the server does not say how large it is")
    if is_web(path) and info["size"] > 1:
        _check_ranges(path)
    return File(path, info["size"], _stamp(info))


def read_bytes(path: str) -> bytes:
    """A file's content. Raises FileNotFoundError and StorageError."""
    data: bytes = retried(path, lambda: _ask(path, lambda fs: fs.cat_file(_key(path))))
    return data


def read_range(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on. Raises OSError where the file cannot be read that far."""
    return retried(path, lambda: whole(path, _part(path, offset, length), length))


def _part(path: str, offset: int, length: int) -> bytes:
    options = {"cache_type": "none"} if scheme_of(path) == "hf" else {}  # which reads megabytes ahead
    data: bytes = _ask(path, lambda fs: fs.cat_file(_key(path), start=offset, end=offset + length, **options))
    return data


def _check_ranges(path: str) -> None:
    """Raise StorageError where a web server sends whole files only; a server is asked once."""
    parts = urlsplit(path)
    server = f"{parts.scheme}://{parts.netloc}"
    if server not in _sends_ranges:
        _sends_ranges[server] = len(retried(path, lambda: _part(path, 0, 1))) == 1
    if not _sends_ranges[server]:
        raise StorageError(f"'{path}': the server does not send parts of files (Range), as data are read: copy them")


_sends_ranges: dict[str, bool] = {}


def _ask(path: str, question: Callable[[Any], T]) -> T:
    """The answer of a store. Raises FileNotFoundError and PermissionError, by what its library raises for those."""
    try:
        return question(_client(scheme_of(path), os.getpid()))
    except Exception as error:
        # The web's says "not found" of whatever goes wrong, and from what.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        status = _status_of(cause)
        if status in (401, 403):
            raise PermissionError(f"'{path}' may not be read: the store answers {status}") from None
        if status in (404, 410) or (isinstance(cause, FileNotFoundError) and status is None):
            raise FileNotFoundError(f"no file at '{path}'") from None
        raise cause from None


def _status_of(error: BaseException) -> int | None:
    """The HTTP status in the errors of aiohttp, gcsfs, Azure and the Hub."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            status = getattr(holder, name, None)
            if str(status).isdigit():
                return int(str(status))
    return None


@lru_cache(maxsize=8)
def _client(scheme: str, process: int) -> Any:
    import fsspec  # takes a while with what it brings, and most runs need none

    options = dict(_STORES[scheme].options)
    if _STORES[scheme] is _GOOGLE and os.environ.get("STORAGE_EMULATOR_HOST"):
        options["token"] = "anon"  # else its library looks for a machine's role for minutes
    if scheme == "hf":  # its library reads this once, as it is imported
        options["endpoint"] = os.environ.get("HF_ENDPOINT")
    # A client that a process was forked with has the threads of another.
    return fsspec.filesystem(scheme, skip_instance_cache=True, **options)


def _key(path: str) -> str:
    """The address as the store's library names files in its listings."""
    return path if is_web(path) else path.partition("://")[2]


def _refresh(path: str) -> dict[str, bool]:
    return {"refresh": True} if scheme_of(path) == "hf" else {}


def _stamp(info: dict[str, Any]) -> str:
    lfs = info.get("lfs") or {}
    found = lfs.get("sha256") or next((info[name] for name in _STAMPS if info.get(name)), info["size"])
    return str(found).strip('"')
