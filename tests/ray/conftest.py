"""One Ray for what runs in the tests' own process, and training as a process that tests may kill."""

import io
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from rayclip.orchestration.cluster import connect
from rayclip.places import place_of

ROOT = Path(__file__).resolve().parents[2]
START_S = 180
"""Longest wait for training to begin, on a busy machine."""


@pytest.fixture(scope="session", autouse=True)
def ray_session():
    """Ray with room for two train workers, a reader and one more, also where there are fewer cores."""
    connect(local_cpus=4)
    yield
    ray.shutdown()


class Terminal(io.StringIO):
    """What is written to it, as if on a terminal."""

    def isatty(self):
        return True


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def terminal():
    return Terminal()


@pytest.fixture
def clock_of(monkeypatch):
    """The clock of a module from now on, to be told the time."""

    def replace(module):
        clock = Clock()
        monkeypatch.setattr(module, "time", clock)
        return clock

    return replace


class TrainingProcess:
    """`python -m jobs.train CONFIG` in a folder, on the cluster at `address` or on a Ray of its own.

    `checkpoints` is the folder that they go to, in S3 where `runs` says so.
    """

    def __init__(self, folder: Path, config: dict, address: str | None = None) -> None:
        path = folder / f"{config['name']}.yaml"
        path.write_text(json.dumps(config))
        self.checkpoints = place_of(config.get("runs", folder / "runs")) / config["name"] / "checkpoints"
        self.log = folder / f"{config['name']}.log"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/platform"}
        environment.pop("RAY_ADDRESS", None)
        self._on_cluster = address is not None
        if address:
            environment["RAY_ADDRESS"] = address
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", str(path)], cwd=folder, env=environment, stdout=log, stderr=log
            )

    def worker_pids(self):
        """The Ray Train workers of this process alone; on a cluster, of all that this Python started."""
        found = []
        for process in psutil.Process().children(recursive=True) if self._on_cluster else self._descendants():
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
        left = self._descendants()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(left, timeout=3)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)

    def _descendants(self):
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@pytest.fixture
def start_training():
    """Starts `jobs.train` on a config in a folder; whatever still runs at the end of the test is killed."""
    started = []

    def start(folder, config, address=None):
        started.append(TrainingProcess(folder, config, address))
        return started[-1]

    yield start
    for training in started:
        if training.process.poll() is None:
            training.kill()


@pytest.fixture(scope="session")
def make_config(tiny_config):
    """A training config as plain values: the tiny model on a data set; sections given are merged in."""

    def make(name, data_path, **sections):
        values = {
            "name": name,
            "seed": 3,
            "model": tiny_config.model_dump(mode="json"),
            "data": {"path": str(data_path)},
            "batch_size": 32,
            "optimizer": {"lr": 1e-3, "warmup_samples": 200},
            "tracking": {"experiment": "tests", "log_every_samples": 64},
        }
        for key, value in sections.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return values

    return make
