"""Jobs submitted to a cluster of several nodes on this machine that asks for a token; a node is killed in mid-run."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import psutil
import pytest

from rayclip.data.order import Order
from rayclip.version import code_version

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "the-token-of-this-test"
NODES, NUM_SAMPLES, EPOCHS, SEED, WINDOW = 4, 500, 8, 3, 4
WAIT_S = 300


class ClusterProcess:
    """The cluster, and `rayclip submit` against it."""

    def __init__(self, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log, self.folder = log, log.parent / "caller"
        self.folder.mkdir()
        script = Path(__file__).with_name("small_cluster.py")
        # Jobs find `python` there; the library they find only in what is shipped with them.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        for name in ("PYTHONPATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_TMPDIR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(port), str(NODES)],
            cwd=log.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        said = self.process.stdout.readline()
        assert said, log.read_text()
        self.address, self.raylets = json.loads(said).values()

    def submit(self, *arguments, token=TOKEN, wait=True):
        """Runs rayclip submit; (exit code, what it showed, its notes), or the running process."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "RAY_API_SERVER_ADDRESS": self.address}
        environment["HOME"] = str(self.log.parent)  # where no other Ray has left a token
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
        command = [sys.executable, "-m", "rayclip", "submit", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)
        return ended(process) if wait else process

    def kill_a_node_with_a_worker(self):
        """As a machine that is switched off: never the head, on which the job itself runs."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "TrainWorker" in " ".join(process.cmdline()[:1]):
                node = next((p.pid for p in process.parents() if p.pid in self.raylets), None)
                if node:
                    self.process.stdin.write(f"kill {node}\n")
                    self.process.stdin.flush()
                    assert self.process.stdout.readline() == "killed\n"
                    return
        raise AssertionError("no node but the head has a worker")

    def close(self):
        left = psutil.Process(self.process.pid).children(recursive=True)
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            for process in [self.process, *psutil.wait_procs(left, timeout=5)[1]]:
                process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    started = ClusterProcess(tmp_path_factory.mktemp("cluster") / "cluster.log")
    yield started
    started.close()


@pytest.fixture(scope="module")
def training(cluster, tmp_path_factory, make_samples, write_dataset, tiny_config):
    """The folder that all nodes share, its manifest, and the arguments of a training that uses it.

    The config is a file of the caller's own, in a folder that no node has.
    """
    folder = tmp_path_factory.mktemp("shared")
    manifest = write_dataset(folder / "data", make_samples(NUM_SAMPLES), shard_samples=150, chunk_samples=16)
    overrides = {
        "name": "submitted",
        "runs": f"{folder}/runs",
        "seed": SEED,
        "model": tiny_config.model_dump(mode="json"),
        "data": {"path": f"{folder}/data", "shuffle_window": WINDOW},
        "samples": None,
        "epochs": EPOCHS,
        "batch_size": 32,
        "evaluation": {},
        "checkpoint": {"every_samples": 320, "keep": 1000, "record_samples": True},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    (cluster.folder / "configs").mkdir()
    (cluster.folder / "configs/small.yaml").write_text(files("rayclip.recipes").joinpath("demo.yaml").read_text())
    arguments = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return folder, manifest, ["train", "configs/small.yaml", *arguments]


def ended(process):
    shown, noted = process.communicate(timeout=WAIT_S)
    return process.returncode, shown, noted


def only_error(code, _, noted):
    assert code == 2, noted
    lines = noted.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), noted
    return lines[0]


def test_who_has_no_token_or_a_wrong_one_is_told_so(cluster):
    without, wrong, right = [cluster.submit("list", token=token, wait=False) for token in ("", "another", TOKEN)]
    assert "asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in only_error(*ended(without))
    assert "does not take this token" in only_error(*ended(wrong))
    assert ended(right) == (0, "  no jobs  \n", "")


def test_what_the_cluster_cannot_place_is_not_submitted(cluster, training):
    _, _, arguments = training
    said = only_error(*cluster.submit(*arguments, "cluster.cpus_per_worker=2"))
    assert "needs 5 CPU, up to 2 CPU on one node; the cluster has 4 CPU on 4 nodes, which may grow to 8 GPU" in said


def test_a_training_goes_on_when_a_node_is_killed(cluster, training):
    folder, manifest, arguments = training
    checkpoints = folder / "runs/submitted/checkpoints"
    submitted = cluster.submit(*arguments, wait=False)
    wait_until(lambda: len(list(checkpoints.glob("samples-*"))) >= 2, submitted)
    at_kill = len(list(checkpoints.glob("samples-*")))
    cluster.kill_a_node_with_a_worker()
    code, shown, noted = ended(submitted)
    assert code == 0, shown + noted
    assert f"note: every node must have {folder}" in noted and " MB" in noted
    assert f"samples {EPOCHS * NUM_SAMPLES:,}/{EPOCHS * NUM_SAMPLES:,}" in shown

    listed = json.loads((checkpoints / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    assert at_kill + 2 < len(listed)
    folders = [checkpoints / result["checkpoint_dir_name"] for result in listed]
    check_samples(np.concatenate([np.load(f / "samples.npy") for f in folders]), manifest)
    # What ran is what was shipped: a package of the library outside git could not tell its commit.
    assert json.loads((folders[-1] / "state.json").read_text())["code_version"] == code_version()
    assert "succeeded  python -m rayclip train small.yaml" in cluster.submit("list")[1]


def test_a_job_s_failure_and_its_stop_come_back(cluster, training):
    folder, _, arguments = training
    # The cluster says that it may grow to eight GPUs: the second is taken, and waits for them.
    failing = cluster.submit("index", f"{folder}/nothing", "--detach", wait=False)
    waiting = cluster.submit(*arguments, "name=waiting", "cluster.use_gpu=true", "--detach", wait=False)
    (_, failing, notes), (_, waiting, more) = ended(failing), ended(waiting)
    assert failing and waiting, notes + more
    code, shown, noted = cluster.submit("logs", failing.strip())
    assert code == 2, noted
    assert f"error: '{folder}/nothing' " in shown
    assert cluster.submit("stop", waiting.strip())[1] == f"{waiting.strip()} stopped\n"
    listed, unknown = cluster.submit("list", wait=False), cluster.submit("status", "another", wait=False)
    assert re.search(rf"{waiting.strip()} +stopped", ended(listed)[1])
    assert "does not exist" in only_error(*ended(unknown))


def wait_until(condition, process):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if process.poll() is not None:
            pytest.fail("\n".join(process.communicate()))
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_samples(samples, manifest):
    """Each row of each chunk of each epoch once."""
    positions, rows, causes = samples.T
    assert not causes.any()
    chunks = Order(SEED, len(manifest), WINDOW).chunks(positions)
    seen = Counter(zip((positions // len(manifest)).tolist(), chunks.tolist(), rows.tolist(), strict=True))
    sizes = list(enumerate(manifest.num_samples.tolist()))
    assert seen == {(epoch, c, row): 1 for epoch in range(EPOCHS) for c, size in sizes for row in range(size)}
