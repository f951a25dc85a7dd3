"""Servers as subprocesses: started on free ports, waited for, measured, and always taken down."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil

from rayclip.errors import UserError

_STOP_S = 40.0


class Server:
    """A server's process with all that it starts. In a `with` block: it answers /healthz when that begins."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], log: Path, start_timeout_s: float) -> None:
        self.name, self.port = name, free_port()
        self._command = [sys.executable, "-m", module, *(part.format(port=self.port) for part in arguments)]
        self._log, self._timeout_s = log, start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where zero-shot requests go."""
        return f"http://127.0.0.1:{self.port}/v1/zero-shot"

    def __enter__(self) -> "Server":
        with self._log.open("wb") as log:
            # A session of its own, so that Ctrl-C reaches it through stop() alone and once.
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def cpu_s(self) -> float:
        """Processor time of all its processes that are alive."""
        total = 0.0
        for process in self._family():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside, so that a server which is busy even when nobody asks it takes nothing of the machine."""
        family = self._family()
        self._signal(family, signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(family, signal.SIGCONT)
        self._wait_until_ready()

    def stop(self) -> None:
        """End it politely, then whatever of it is left."""
        if self._process is None:
            return
        family = self._family()
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            print(f"{self.name} does not stop: it is killed", file=sys.stderr)
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()
        self._process.wait()
        self._process = None

    def _family(self) -> list[psutil.Process]:
        """Its processes: all of its session, also those whose parent is gone, and descendants that left the session."""
        assert self._process is not None
        session, family = self._process.pid, set()
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == session:
                    family |= {process, *process.children(recursive=True)}
            except (psutil.Error, OSError):
                continue
        return list(family)

    def _signal(self, family: list[psutil.Process], number: signal.Signals) -> None:
        for process in family:
            with suppress(psutil.Error):
                process.send_signal(number)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._timeout_s
        while not self._answers():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = "ended at its start" if ended else f"was not ready after {self._timeout_s:.0f} s"
                raise UserError(f"{self.name} {what}; the last line of {self._log}: {self._last_line()}")
            time.sleep(0.25)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=10) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "(empty)")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
