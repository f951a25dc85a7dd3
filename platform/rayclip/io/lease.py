"""Leases: a folder, on disk or in S3, is held by one process at a time.

The holder keeps `owner.json` in the folder (conditional.py) and renews it; it lets go when it ends. A holder that was
killed loses the folder at once where this machine can see that its process is gone, and elsewhere when it has not
renewed for a whole term, by the clock of who wants it: clocks of two machines are never compared.

A holder that was only paused wakes up late and may not know that it has lost the folder. What its processes write, on
whatever machine, they write after asking a `Fence`, which knows the holder by its id.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from rayclip.errors import UserError
from rayclip.io.conditional import ConditionalFile, Found, conditional_file, encode
from rayclip.io.paths import StoragePath
from rayclip.io.s3 import ChangedError

FILE_NAME, _LOCK_NAME = "owner.json", "owner.lock"
FILE_NAMES = (FILE_NAME, _LOCK_NAME)
"""Beginnings of the names of files that a holder keeps in the folder."""
TERM_S = 60.0
"""How long a holder on another machine may be silent before it has lost the folder. It renews three times a term.

RAYCLIP_LEASE_TERM_S in the holder's environment replaces it; the record says it, for those who wait.
"""
_LOOK_EVERY_S = 1.0

_logger = logging.getLogger(__name__)


class HeldError(UserError):
    """Another process holds the folder."""


class LostError(UserError):
    """The holder was silent for a whole term, and another process holds the folder now."""


@dataclass(frozen=True)
class Fence:
    """Tells whether a folder still is the holder's: asked before each write, in any of its processes, by any machine.

    Small and picklable.
    """

    folder: StoragePath
    holder: str
    """The id in the holder's record."""

    def check(self) -> None:
        """Raise LostError where another holds the folder, or nobody. Raises OSError where that cannot be read."""
        found = _file_in(self.folder).read()
        if found is not None and found.record.get("id") == self.holder:
            return
        whose = "it was removed, or another took it and has ended"
        if found is not None:
            whose = f"it was silent for too long, and the folder is held by {_describe_holder(found.record)} now"
        raise LostError(f"'{self.folder}' is not this process's any more: {whose}")


class Lease:
    """What a holder has: `check` raises once it is lost."""

    def __init__(
        self, folder: StoragePath, record: dict[str, Any], file: ConditionalFile, version: str, term_s: float
    ) -> None:
        self.folder, self._record, self._file, self._version, self._term_s = folder, record, file, version, term_s
        self._renewed_at = time.monotonic()
        self._ended, self._lost, self._renewing = threading.Event(), threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease {folder}", daemon=True)
        self._thread.start()

    @property
    def fence(self) -> Fence:
        """Return what the holder's other processes ask before they write to the folder."""
        return Fence(self.folder, self._record["id"])

    def check(self) -> None:
        """Raise LostError where this process does not hold the folder any more, or cannot know that it does.

        One that was paused for longer than a term goes on where nobody has taken the folder meanwhile.
        """
        if self._is_overdue() and not self._lost.is_set():
            self._renew()
        if self._lost.is_set():
            with suppress(OSError):
                self.fence.check()  # says who has it
        if self._lost.is_set() or self._is_overdue():
            raise LostError(
                f"'{self.folder}' was not renewed for {self._term_s:.0f} s and may be another process's now"
            )

    def is_lost(self) -> bool:
        """Whether another has the folder, or may have it; asked before the last words on it are said elsewhere."""
        try:
            self.check()
            self.fence.check()
        except (LostError, OSError):
            return True
        return False

    def release(self) -> None:
        """Let go of the folder, for anyone to take."""
        self._ended.set()
        self._thread.join()
        if not self._lost.is_set():
            with suppress(OSError):  # it ends by itself after a term
                self._file.remove(self._version)

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._renewed_at > self._term_s

    def _keep_renewing(self) -> None:
        while not self._lost.is_set() and not self._ended.wait(self._term_s / 3):
            self._renew()

    def _renew(self) -> None:
        with self._renewing:
            begun = time.monotonic()
            self._record["renewals"] += 1
            try:
                self._version = self._file.replace(encode(self._record), self._version)
            except ChangedError:
                self._lost.set()
            except OSError as error:  # the next try may go better; `check` watches the time
                _logger.warning("the lease of '%s' was not renewed: %s", self.folder, error)
            else:
                self._renewed_at = begun


@contextmanager
def hold(
    folder: StoragePath, what: str, term_s: float | None = None, say: Callable[[str], None] = lambda line: None
) -> Iterator[Lease]:
    """Hold a folder while the block runs. `what` names it to people, as "run 'mine'".

    `say` is given a line before a wait for a holder elsewhere that may be gone. Raises HeldError, which names the
    holder and since when, where another process holds it.
    """
    lease = _take(folder, what, term_s or float(os.environ.get("RAYCLIP_LEASE_TERM_S", TERM_S)), say)
    try:
        yield lease
    finally:
        lease.release()


def _take(folder: StoragePath, what: str, term_s: float, say: Callable[[str], None]) -> Lease:
    file = _file_in(folder)
    seen, since = None, time.monotonic()
    while True:
        found = file.read()
        record = _new_record(term_s)
        if found is None or _is_gone(found.record):
            try:
                return Lease(folder, record, file, _put(file, record, found), term_s)
            except ChangedError:
                continue  # another was faster: it is looked at next
        if not _may_be_gone(found.record):
            raise HeldError(_describe(found.record, what))
        now, its_term_s = time.monotonic(), float(found.record.get("term_s", term_s))
        if seen is None:
            say(f"{_describe(found.record, what)}; looking for {its_term_s:.0f} s whether it still is")
        elif seen != found.version:
            raise HeldError(_describe(found.record, what))
        elif now - since >= its_term_s:
            try:
                return Lease(folder, record, file, _put(file, record, found), term_s)
            except ChangedError:
                raise HeldError(_describe(found.record, what)) from None
        if seen != found.version:
            seen, since = found.version, now
        time.sleep(min(_LOOK_EVERY_S, its_term_s / 10))


def _file_in(folder: StoragePath) -> ConditionalFile:
    return conditional_file(folder / FILE_NAME, _LOCK_NAME)


def _put(file: ConditionalFile, record: dict[str, Any], found: Found | None) -> str:
    return file.create(encode(record)) if found is None else file.replace(encode(record), found.version)


def _new_record(term_s: float) -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "term_s": term_s,
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
    return f"one at a time: {what} is held by {_describe_holder(record)}"


def _describe_holder(record: dict[str, Any]) -> str:
    return f"process {record.get('pid')} on host {record.get('host')} since {record.get('since')}"
