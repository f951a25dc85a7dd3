"""Leases: a folder, on disk or in S3, is held by one process at a time.

The holder keeps `owner.json` in the folder and renews it; it lets go when it ends. A holder that was killed loses the
folder at once where this machine can see that its process is gone, and elsewhere when it has not renewed for a whole
term, by the clock of who wants it: clocks of two machines are never compared.

On disk the file is looked at and replaced under flock; in S3 it is written on conditions (If-None-Match, If-Match), so
of several that want it at once exactly one gets it.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from rayclip.errors import UserError
from rayclip.io import s3
from rayclip.io.paths import RemotePath, StoragePath
from rayclip.io.s3 import ChangedError, StorageError

FILE_NAME, _LOCK_NAME = "owner.json", "owner.lock"
FILE_NAMES = (FILE_NAME, _LOCK_NAME)
"""Beginnings of the names of files that a holder keeps in the folder."""
TERM_S = 60.0
"""How long a holder on another machine may be silent before it has lost the folder. It renews three times a term."""
_LOOK_EVERY_S = 1.0

_logger = logging.getLogger(__name__)


class HeldError(UserError):
    """Another process holds the folder."""


class LostError(UserError):
    """The holder was silent for a whole term, and another process holds the folder now."""


class Lease:
    """What a holder has: `check` raises once it is lost."""

    def __init__(
        self, folder: StoragePath, record: dict[str, Any], store: "_Store", version: str, term_s: float
    ) -> None:
        self.folder, self._record, self._store, self._version, self._term_s = folder, record, store, version, term_s
        self._renewed_at = time.monotonic()
        self._ended, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease {folder}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LostError where this process does not hold the folder any more, or cannot know that it does."""
        if self._lost.is_set() or time.monotonic() - self._renewed_at > self._term_s:
            raise LostError(
                f"'{self.folder}' was not renewed for {self._term_s:.0f} s and may be another process's now"
            )

    def release(self) -> None:
        """Let go of the folder, for anyone to take."""
        self._ended.set()
        self._thread.join()
        if not self._lost.is_set():
            with suppress(OSError):  # it ends by itself after a term
                self._store.remove(self._version)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._term_s / 3):
            begun = time.monotonic()
            self._record["renewals"] += 1
            try:
                self._version = self._store.replace(_encode(self._record), self._version)
            except ChangedError:
                self._lost.set()
                return
            except OSError as error:  # the next try may go better; `check` watches the time
                _logger.warning("the lease of '%s' was not renewed: %s", self.folder, error)
            else:
                self._renewed_at = begun


@contextmanager
def hold(
    folder: StoragePath, what: str, term_s: float = TERM_S, say: Callable[[str], None] = lambda line: None
) -> Iterator[Lease]:
    """Hold a folder while the block runs. `what` names it to people, as "run 'mine'".

    `say` is given a line before a wait for a holder elsewhere that may be gone. Raises HeldError, which names the
    holder and since when, where another process holds it.
    """
    lease = _take(folder, what, term_s, say)
    try:
        yield lease
    finally:
        lease.release()


def _take(folder: StoragePath, what: str, term_s: float, say: Callable[[str], None]) -> Lease:
    store = _store_of(folder)
    seen, since = None, time.monotonic()
    while True:
        found = store.read()
        record = _new_record()
        if found is None or _is_gone(found.record):
            try:
                return Lease(folder, record, store, _put(store, record, found), term_s)
            except ChangedError:
                continue  # another was faster: it is looked at next
        if not _may_be_gone(found.record):
            raise HeldError(_describe(found.record, what))
        now = time.monotonic()
        if seen is None:
            say(f"{_describe(found.record, what)}; looking for {term_s:.0f} s whether it still is")
        elif seen != found.version:
            raise HeldError(_describe(found.record, what))
        elif now - since >= term_s:
            try:
                return Lease(folder, record, store, _put(store, record, found), term_s)
            except ChangedError:
                raise HeldError(_describe(found.record, what)) from None
        if seen != found.version:
            seen, since = found.version, now
        time.sleep(min(_LOOK_EVERY_S, term_s / 10))


def _put(store: "_Store", record: dict[str, Any], found: "_Found | None") -> str:
    return store.create(_encode(record)) if found is None else store.replace(_encode(record), found.version)


def _new_record() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "renewals": 0,
    }


def _machine() -> str:
    """What a process number means something on: this start of this machine, and this container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116
    except OSError:  # no Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _start_of(pid: int) -> str | None:
    """When a process began, in the kernel's own count, which no clock moves; None for one that is gone."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        stat = Path(f"/proc/{pid}/stat")
        return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else str(process.create_time())
    except (psutil.Error, OSError):
        return None


def _is_gone(record: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    return record.get("machine") == _machine() and _start_of(int(record["pid"])) != record["started"]


def _may_be_gone(record: dict[str, Any]) -> bool:
    """Whether the holder is where this machine cannot see it."""
    return record.get("machine") != _machine()


def _describe(record: dict[str, Any], what: str) -> str:
    holder = f"process {record.get('pid')} on host {record.get('host')}"
    return f"one at a time: {what} is held by {holder} since {record.get('since')}"


def _encode(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


class _Found(NamedTuple):
    record: dict[str, Any]
    version: str


class _Store(Protocol):
    """Where the file is. Every write is on the condition that the file is as it was read."""

    def read(self) -> _Found | None:
        """The record with its version; None where there is none."""

    def create(self, data: bytes) -> str:
        """Write where there is no file; the version. Raises ChangedError."""

    def replace(self, data: bytes, version: str) -> str:
        """Write where the file is still of this version; the new version. Raises ChangedError."""

    def remove(self, version: str) -> None:
        """Delete the file where it is still of this version."""


def _store_of(folder: StoragePath) -> _Store:
    return _RemoteStore(folder / FILE_NAME) if isinstance(folder, RemotePath) else _DiskStore(folder / FILE_NAME)


def _parse(data: bytes) -> dict[str, Any]:
    """A record; one that cannot be read is of a holder that nobody can see."""
    try:
        record = json.loads(data)
        return record if isinstance(record, dict) else {}
    except ValueError:
        return {}


class _DiskStore:
    """A version is the content: each has an id and a count of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: list[Path] = []

    def read(self) -> _Found | None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        return _Found(_parse(data), data.decode(errors="replace"))

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
        with self._locked():
            found = self.read()
            if (found and found.version) != version:
                raise ChangedError(str(self._path))
            partial = self._path.with_name(f"{FILE_NAME}.{uuid.uuid4().hex[:8]}")
            partial.write_bytes(data)
            partial.replace(self._path)
        return data.decode()

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        """The file `owner.lock` is locked, by the kernel, which lets go of it when the process dies."""
        import fcntl  # not on Windows, where there is no Ray cluster either

        lock = self._path.with_name(_LOCK_NAME)
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


class _RemoteStore:
    """A version is the file's ETag."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path

    def read(self) -> _Found | None:
        try:
            data, tag = s3.read_tagged(str(self._path))
        except FileNotFoundError:
            return None
        return _Found(_parse(data), tag)

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
