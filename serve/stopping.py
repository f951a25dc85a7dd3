"""Ending a service so that what it has accepted is answered: readiness first, then the door, then the rest."""

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil

from rayclip.orchestration.cluster.ray_internals import haproxy_socket
from rayclip.serve.config import ServeConfig

_WATCH_S = 2.0
_FLUSH_S = 3.0


class StopRequestedError(BaseException):
    """Raised by a signal while the service is being started; no `except Exception` may take it for a failure."""


class StopSignals:
    """SIGINT and SIGTERM: the first ends the service gently, another one at once."""

    def __init__(self) -> None:
        self._first = threading.Event()
        self.again = threading.Event()
        """Set by the second signal."""
        self.number = 0
        self._is_starting = True

    def install(self) -> None:
        """Take the signals; again after `ray.init`, which takes SIGTERM for itself."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Return once a signal has come; call `meanwhile` every few seconds."""
        self._is_starting = False
        while not self._first.wait(_WATCH_S):
            meanwhile()

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.number

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._first.is_set():
            self.again.set()
            return
        self.number = number
        self._first.set()
        if self._is_starting:
            raise StopRequestedError


class ProblemReporter:
    """Prints what is wrong with the versions or the registry when it begins, and when it is over."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._told: list[str] = []

    def __call__(self) -> None:
        """Ask the coordinator, and print what is new."""
        try:
            problems = self._coordinator.problems.remote().result(timeout_s=_WATCH_S)
        except Exception:  # it is being replaced: the next look will tell
            return
        for problem in problems:
            if problem not in self._told:
                print(f"warning: {problem}", file=sys.stderr, flush=True)
        for problem in self._told:
            if problem not in problems:
                print(f"over: {problem}", file=sys.stderr, flush=True)
        self._told = problems


def drain(config: ServeConfig, coordinator: Any, again: threading.Event, patience_s: float) -> bool:
    """Turn readiness off, take no more requests after `stop_delay_s`, and wait for those that were accepted.

    Returns whether all were answered; not where `again` is set meanwhile, or the coordinator does not answer within
    `patience_s`.
    """
    try:
        coordinator.enter.remote("stopping").result(timeout_s=patience_s)
        again.wait(config.poll_s + config.stop_delay_s)  # every replica has heard of it by its next report
        door = close_door()
        coordinator.enter.remote("closed").result(timeout_s=patience_s)
        deadline = time.monotonic() + config.request_timeout_s + 5 * config.poll_s
        while not again.is_set() and time.monotonic() < deadline:
            if coordinator.is_idle.remote().result(timeout_s=patience_s):
                _wait_for_end(door, again)
                return True
            again.wait(min(0.2, config.poll_s))
    except Exception as error:  # Ray is going down by itself: there is nothing to wait for
        print(f"warning: requests may be cut off: {type(error).__name__}: {error}", file=sys.stderr)
    return False


def close_door() -> psutil.Process | None:
    """Have this machine's HAProxy take no more connections and end once it has none; none where there is no HAProxy.

    By its signal: the command that shuts a frontend down leaves the port open, and who connects waits in vain.
    """
    for line in _ask_haproxy("show info").splitlines():
        name, _, value = line.partition(": ")
        if name == "Pid":
            try:
                process = psutil.Process(int(value))
                process.send_signal(signal.SIGUSR1)
                return process
            except psutil.Error:
                return None
    return None


def _wait_for_end(door: psutil.Process | None, again: threading.Event) -> None:
    """Until HAProxy has passed on the last answer; a connection on which nothing was asked does not hold it up long."""
    deadline = time.monotonic() + _FLUSH_S
    while door is not None and not again.is_set() and time.monotonic() < deadline:
        try:
            if door.status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.Error:
            return
        again.wait(0.05)


def _ask_haproxy(command: str) -> str:
    """What HAProxy answers on the socket that the settings of a service of our own name; nothing where it is not."""
    path = haproxy_socket()
    if not path:
        return ""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(path)
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
    except OSError:
        return ""
