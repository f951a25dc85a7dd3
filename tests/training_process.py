"""Training as a process that tests may kill."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from rayclip.io.paths import storage_path

ROOT = Path(__file__).resolve().parents[1]
START_S = 180
"""Longest wait for training to begin, on a busy machine."""


class TrainingProcess:
    """`python -m jobs.train CONFIG` in a folder, on the cluster at `address` or on a Ray of its own.

    `checkpoints` is the folder that they go to, in S3 where `runs` says so. `under` is a command that runs it.
    """

    def __init__(self, folder: Path, config: dict, address: str | None = None, under: Sequence[str] = ()) -> None:
        path = folder / f"{config['name']}.yaml"
        path.write_text(json.dumps(config))
        self.checkpoints = storage_path(config.get("runs", folder / "runs")) / config["name"] / "checkpoints"
        self.log = folder / f"{config['name']}.log"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/platform"}
        environment.pop("RAY_ADDRESS", None)
        self.environment = environment
        self._on_cluster = address is not None
        if address:
            environment["RAY_ADDRESS"] = address
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*under, sys.executable, "-m", "jobs.train", str(path)],
                cwd=folder, env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def worker_pids(self):
        """The Ray Train workers of this process alone; on a cluster, of all that this Python started."""
        found = []
        for process in psutil.Process().children(recursive=True) if self._on_cluster else self.descendants():
            try:
                # The actor's name comes first in the title; processes that work for it may mention it elsewhere.
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and "TrainWorker" in title:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def latest(self):
        """State of the checkpoint that a restart begins with, None before the first."""
        try:
            snapshot = json.loads((self.checkpoints / "checkpoint_manager_snapshot.json").read_text())
            name = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
            return json.loads((self.checkpoints / name / "state.json").read_text())
        except (FileNotFoundError, ValueError, TypeError):  # not there, or half written
            return None

    def wait_until(self, condition, timeout_s=START_S):
        """What `condition(state of the latest checkpoint)` gives once that is true; the process must be running."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.latest()
            if state is not None and condition(state):
                return state
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"nothing in {timeout_s} s: {self.log.read_text()}"
            time.sleep(0.02 if isinstance(self.checkpoints, Path) else 0.2)

    def end(self, timeout_s=START_S):
        """Wait for it; the exit code."""
        return self.process.wait(timeout_s)

    def kill(self):
        """SIGKILL for the driver; what it leaves behind ends by itself, or is killed too."""
        left = self.descendants()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(left, timeout=3)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)

    def descendants(self):
        """All processes that it has started, and those that they have."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
