"""A run on a cluster whose nodes come and go: it shrinks, it grows, and every sample counts once."""

import json
import os
import signal
import threading
from collections import Counter
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from rayclip.data.manifest import Manifest
from rayclip.data.order import Order

pytestmark = pytest.mark.chaos

EPOCHS = 6
NUM_SAMPLES = 1000
CHECKPOINT_EVERY = 400
NODE = {"num_cpus": 3, "object_store_memory": 100 * 2**20}
"""Room for one worker and a reader."""
LARGE_NODE = NODE | {"num_cpus": 4}
"""Room for two workers."""


@pytest.fixture
def cluster(monkeypatch):
    """A cluster whose nodes are of this machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # its nodes share the cores of one machine
    # What has been killed refuses connections at once; what is only busy has ten seconds to answer.
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "5000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "2")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=NODE | {"include_dashboard": False})
    yield cluster
    cluster.shutdown()


@contextmanager
def slowed(pids):
    """Processes that hardly get on with what they do, but answer: a run of theirs cannot end before others join it."""
    assert pids
    done = threading.Event()

    def send(signal_number):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal_number)

    def hold():
        while not done.is_set():
            send(signal.SIGSTOP)
            done.wait(0.3)
            send(signal.SIGCONT)
            done.wait(0.03)

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        yield
    finally:
        done.set()
        holding.join()


def test_nodes_that_come_and_go_lose_and_repeat_nothing(
    tmp_path, cluster, make_samples, write_dataset, make_config, start_training
):
    data = tmp_path / "data"
    write_dataset(data, make_samples(NUM_SAMPLES), shard_samples=150, chunk_samples=16)
    config = make_config(
        "elastic",
        data,
        epochs=EPOCHS,
        checkpoint={"every_samples": CHECKPOINT_EVERY, "keep": 1000, "record_samples": True},
        tracking={"log_every_samples": 320},
        cluster={"num_workers": [1, 3], "cpus_per_worker": 2, "resize_every_s": 1},
    )
    second = cluster.add_node(**NODE)
    training = start_training(tmp_path, config, address=cluster.address)

    def sizes():
        lines = training.log.read_text().splitlines()
        return [int(line.split()[2]) for line in lines if line.startswith("training on ")]

    training.wait_until(lambda s: sizes()[-1] == 2 and s["samples_seen"] % NUM_SAMPLES)
    cluster.remove_node(second, allow_graceful=False)
    lost_at = training.latest()["samples_seen"]
    training.wait_until(lambda s: sizes()[-1] == 1 and s["samples_seen"] > lost_at + 2 * CHECKPOINT_EVERY)
    with slowed(training.worker_pids()):
        cluster.add_node(**LARGE_NODE)
        training.wait_until(lambda _: sizes()[-1] == 3)
    assert training.end() == 0, training.log.read_text()

    # A worker may have been writing one more as it was told to go: what is not listed, nothing went on from.
    snapshot = json.loads((training.checkpoints / "checkpoint_manager_snapshot.json").read_text())
    folders = [training.checkpoints / result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"]]
    records = [np.load(folder / "samples.npy") for folder in folders]
    positions, rows, _ = np.concatenate(records).T
    manifest = Manifest.load(data)
    chunks = Order(config["seed"], len(manifest), 8).chunks(positions)
    expected = {(c, r): EPOCHS for c, num_rows in enumerate(manifest.num_samples.tolist()) for r in range(num_rows)}
    assert Counter(zip(chunks.tolist(), rows.tolist(), strict=True)) == expected
    summary = json.loads((tmp_path / "runs/elastic/summary.json").read_text())
    assert summary["samples_seen"] == EPOCHS * NUM_SAMPLES
