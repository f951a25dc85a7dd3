"""A run has one owner: the same command twice, after a kill, and on two hosts; on disk and in S3.

RAYCLIP_DOUBLE_STARTS says how many double starts there are for each; continuous integration makes few.
"""

import io
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter

import numpy as np
import pytest
from mlflow import MlflowClient

from rayclip.io import storage
from rayclip.io.paths import storage_path, upload_folder

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

NUM_SAMPLES = 96
DOUBLE_STARTS = int(os.environ.get("RAYCLIP_DOUBLE_STARTS", "1"))
WAIT_S = 300
TERM_S = 6.0

# A host of its own as far as processes and their names go: its process numbers mean nothing outside.
HOST = ["unshare", "--user", "--map-root-user", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
HOST += ["sh", "-c", 'hostname elsewhere && "$@"; exit $?', "sh"]


@pytest.fixture(params=["disk", "s3"])
def make_run(request, tmp_path, make_samples, write_dataset, make_config, monkeypatch):
    """Makes the config of a run of a name; its data and its folder are on disk or in S3."""
    write_dataset(tmp_path / "set", make_samples(NUM_SAMPLES))
    place = tmp_path
    if request.param == "s3":
        request.getfixturevalue("s3")
        place = storage_path(f"s3://data/{tmp_path.name}")
        upload_folder(tmp_path / "set", place / "set")
    monkeypatch.setenv("RAYCLIP_LEASE_TERM_S", str(TERM_S))

    def make(name, epochs, checkpoint_every=NUM_SAMPLES // 2, log_every=16):
        return make_config(
            name, place / "set", runs=str(place / "runs"), epochs=epochs, batch_size=16,
            checkpoint={"every_samples": checkpoint_every, "keep": 1000, "record_samples": True},
            tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": name, "log_every_samples": log_every},
        )  # fmt: skip

    return make


@pytest.mark.timeout(300 + 120 * DOUBLE_STARTS)
def test_of_a_command_given_twice_one_trains_and_one_is_refused(make_run, start_training, tmp_path):
    delays = random.Random(5)
    for number in range(DOUBLE_STARTS):
        config = make_run(f"twice-{number}", epochs=4)
        first = start_training(tmp_path, config)
        time.sleep(delays.uniform(0, 5))
        second = start_training(tmp_path, config)
        codes = {training: training.end(WAIT_S) for training in (first, second)}
        log = first.log.read_text()
        assert sorted(codes.values()) == [0, 2], log
        owner = next(training for training, code in codes.items() if code == 0)
        said = f"error: one at a time: run 'twice-{number}' is held by process {owner.process.pid} on host "
        assert next(line for line in log.splitlines() if line.startswith("error: ")).startswith(said), log
        check_run(config, owner, [1])


def test_who_follows_a_killed_holder_has_the_run_at_once(make_run, start_training, tmp_path):
    config = make_run("killed", epochs=100)
    first = start_training(tmp_path, config)
    wait_for_owner(first, first.process.pid)
    os.kill(first.process.pid, signal.SIGKILL)  # and not waited for: what it has started may still be at work
    second, begun = start_training(tmp_path, config), time.monotonic()
    wait_for_owner(second, second.process.pid)
    print(f"held again {time.monotonic() - begun:.1f} s after the command")
    assert "looking for" not in second.log.read_text(), "nobody waits for a holder that is gone"
    second.kill()
    first.kill()


def test_of_two_hosts_the_one_that_was_paused_loses_the_run_and_writes_nothing_more(make_run, start_training, tmp_path):
    check_unshare()
    config = make_run("hosts", epochs=120, checkpoint_every=1920, log_every=1920)
    whole_host = config["runs"].startswith("s3:")  # on disk the driver alone: what it has started goes on
    paused = start_training(tmp_path, config, under=HOST)
    wait_for_owner(paused, pid=None)
    other = start_training(tmp_path, config)
    assert other.end(WAIT_S) == 2
    log = other.log.read_text()
    assert " on host elsewhere since " in log and f"looking for {TERM_S:.0f} s whether it still is" in log

    saved = (paused.latest() or {"samples_seen": 0})["samples_seen"]
    paused.wait_until(lambda state: state["samples_seen"] > saved, WAIT_S)
    time.sleep(0.4)  # what goes with the checkpoint is written: between two requests it is stopped, not within one
    driver = next(p for p in paused.descendants() if "jobs.train" in p.cmdline() and p.name() != "sh")
    stopped = [driver, *(driver.children(recursive=True) if whole_host else ())]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    other = start_training(tmp_path, config)
    assert other.end(WAIT_S) == 0, other.log.read_text()
    check_run(config, other, [1, 2])
    before = written(config)
    for process in stopped:
        process.send_signal(signal.SIGCONT)
    assert paused.end(WAIT_S) == 2
    (error,) = (line for line in paused.log.read_text().splitlines()[::-1] if "is not this process's any more" in line)
    assert error.startswith("error: '") and "another took it and has ended" in error
    assert written(config) == before
    check_run(config, other, [1, 2])


def check_unshare():
    tried = subprocess.run([*HOST, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"NOT TESTED: this machine makes no namespaces: {tried.stderr.strip()}")


def wait_for_owner(training, pid):
    """Until the training process holds its run, as this number, or as whatever it has on its own host."""
    owner, deadline = training.checkpoints.parent / "owner.json", time.monotonic() + WAIT_S
    while not owner.is_file() or pid not in (None, json.loads(owner.read_bytes())["pid"]):
        assert training.process.poll() is None and time.monotonic() < deadline, training.log.read_text()
        time.sleep(0.02)


def written(config):
    """What the run's folder and its MLflow run hold: files with their stamps, points with their times."""
    client, run = mlflow_run(config)
    points = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    files = storage.list_files(f"{config['runs']}/{config['name']}")
    return files, run.info.status, {key: [(p.step, p.value, p.timestamp) for p in points[key]] for key in points}


def mlflow_run(config):
    client = MlflowClient(config["tracking"]["uri"])
    (run,) = client.search_runs([client.get_experiment_by_name(config["name"]).experiment_id])
    return client, run


def check_run(config, training, generations):
    """One run's checkpoints, with each sample of each epoch once, and one run's points, each step once."""
    total, samples, saved_by = NUM_SAMPLES * config["epochs"], [], {}
    for file in storage.list_files(str(training.checkpoints)):
        if file.name.endswith("/state.json"):
            folder = training.checkpoints / file.name.partition("/")[0]
            state = json.loads((folder / "state.json").read_bytes())
            saved_by[state["samples_seen"]] = state["generation"]
            samples.append(np.load(io.BytesIO((folder / "samples.npy").read_bytes())))
    counted = Counter(map(tuple, np.concatenate(samples)[:, :2].tolist()))
    assert len(counted) == counted.total() == total == max(saved_by)
    in_order = [saved_by[samples_seen] for samples_seen in sorted(saved_by)]
    assert in_order == sorted(in_order) and sorted(set(in_order)) == generations
    record = json.loads((training.checkpoints.parent / "run.json").read_bytes())
    assert record["generation"] == generations[-1]

    client, run = mlflow_run(config)
    assert run.info.status == "FINISHED" and run.info.run_id == record["mlflow_run_id"]
    steps, every = client.get_metric_history(run.info.run_id, "loss"), config["tracking"]["log_every_samples"]
    assert [point.step for point in steps] == list(range(every, total + 1, every))
