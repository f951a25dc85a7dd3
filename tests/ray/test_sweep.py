"""Sweeps on a real Ray and a real MLflow: one whose driver is killed, and one whose trials are stopped and fail."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from jobs import sweep as sweep_job
from rayclip.config import SweepConfig, TrainConfig
from rayclip.config_file import load
from rayclip.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PARENT = "mlflow.parentRunId"
NUM_SAMPLES = 256
START_S = 300
"""Longest wait for a trial to end, on a busy machine."""


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_samples, write_dataset):
    """A data set with one picture that cannot be read, to train and to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    samples = make_samples(NUM_SAMPLES)
    samples[7]["png"] = b"not a picture"
    write_dataset(folder / "train", samples, shard_samples=64, chunk_samples=16)
    write_dataset(folder / "pictures", make_samples(40, seed=1))
    (folder / "pictures/classnames.txt").write_text("one\ntwo\nthree\n")
    return folder


@pytest.fixture
def make_sweep(make_config, data):
    """A sweep's settings as plain values."""

    def make(name, plan, samples, **rest):
        evaluation = {"tasks": {"classes": {"kind": "zero_shot", "path": str(data / "pictures")}}}
        base = make_config("base", data / "train", samples=samples, evaluation=evaluation, **rest)
        del base["name"]
        return {"name": name, "metric": "classes.top1", "max_concurrent": 2, "plan": plan, "base": base}

    return make


def runs_of(folder):
    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    parents = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    children = {run.info.run_name: run for run in runs if run not in parents}
    assert len(parents) == 1 and len(children) == len(runs) - 1, "every trial has one run, and the sweep one"
    assert {run.data.tags[PARENT] for run in children.values()} == {parents[0].info.run_id}
    return parents[0], children


def rows_of(path):
    with path.open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.chaos
def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path, make_sweep):
    plan = {"kind": "search", "space": {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, "num_trials": 2}
    config = make_sweep("killed", plan, 512) | {"max_concurrent": 1}
    (tmp_path / "killed.yaml").write_text(json.dumps(config))
    folder = tmp_path / "runs/sweeps/killed"

    first = start(tmp_path)
    deadline = time.monotonic() + START_S
    while not ((folder / "trial-000/summary.json").exists() and (folder / "trial-001/run.json").exists()):
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    kill(first)
    finished = files_of(folder / "trial-000")
    parent, children = runs_of(tmp_path)
    assert children["trial-000"].info.status == "FINISHED"

    assert start(tmp_path).wait(START_S) == 0, (tmp_path / "log").read_text()
    assert files_of(folder / "trial-000") == finished
    parent_after, children_after = runs_of(tmp_path)
    assert parent_after.info.run_id == parent.info.run_id and parent_after.info.status == "FINISHED"
    assert children_after["trial-000"].to_dictionary() == children["trial-000"].to_dictionary()
    assert children_after["trial-001"].info.run_id == children["trial-001"].info.run_id
    assert {name: run.info.status for name, run in children_after.items()} == {
        "trial-000": "FINISHED",
        "trial-001": "FINISHED",
    }
    rows = rows_of(folder / "trials.csv")
    assert [row["status"] for row in rows.values()] == ["finished", "finished"]
    assert {row["samples"] for row in rows.values()} == {"510"}, "two epochs without the one that cannot be read"
    assert {row["unique_samples"] for row in rows.values()} == {"256"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_finished"] == 2 and summary["share_saved"] == 0


def test_asha_stops_trials_at_their_evaluation_and_a_mistake_is_told_not_retried(
    tmp_path, make_sweep, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    space = {
        "optimizer.lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "data.max_bad_fraction": {"choices": [0.0, 0.5, 0.5, 0.5]},
    }
    plan = {"kind": "search", "space": space, "num_trials": 5, "algorithm": "asha", "seed": 2}
    plan |= {"grace_samples": 128, "reduction_factor": 2}
    values = make_sweep("asha", plan, 512)
    values["base"]["evaluation"]["every_samples"] = 128
    config = SweepConfig.model_validate(values)
    with pytest.raises(UserError, match=r"of 5 trials failed: .*samples could not be read"):
        sweep_job.main(config)

    folder = tmp_path / "runs/sweeps/asha"
    summary = json.loads((folder / "summary.json").read_text())
    rows = rows_of(folder / "trials.csv")
    assert summary["num_failed"] == len(summary["failed"]) > 0
    assert all(rows[name]["data.max_bad_fraction"] == "0.0" for name in summary["failed"])
    stopped = [row for row in rows.values() if row["status"] == "stopped"]
    assert 0 < len(stopped) == summary["num_stopped"]
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    for row in stopped:
        (last,) = [entry for entry in journal if entry["trial"] == row["name"] and not entry["goes_on"]]
        assert int(row["samples"]) == last["samples_seen"] < 510
        assert max(int(path.name[-12:]) for path in (folder / row["name"] / "checkpoints").glob("samples-*")) == int(
            row["samples"]
        )
    _, children = runs_of(tmp_path)
    expected = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    assert {name: run.info.status for name, run in children.items()} == {
        name: expected[row["status"]] for name, row in rows.items()
    }
    spent = sum(int(row["samples"]) for row in rows.values() if row["samples"])
    assert summary["share_saved"] == pytest.approx(1 - spent / (5 * 512), abs=0.11)  # a failed one has trained a little
    best = max((row for row in rows.values() if row["status"] == "finished"), key=lambda row: row["classes.top1"])
    assert summary["best"]["classes.top1"] == pytest.approx(float(best["classes.top1"]))
    config = load(TrainConfig, folder / "best.yaml", [])
    assert config.optimizer.lr == summary["best"]["values"]["optimizer.lr"]
    assert config.tracking.parent_run_id is None

    capsys.readouterr()
    before = files_of(folder)
    with pytest.raises(UserError, match="trials failed"):
        sweep_job.main(SweepConfig.model_validate(values))  # it tries the failed ones again, and nothing else
    after = files_of(folder)
    for row in rows.values():
        if row["status"] != "failed":
            assert {p: f for p, f in after.items() if row["name"] in p.parts} == {
                p: f for p, f in before.items() if row["name"] in p.parts
            }
    values["base"]["batch_size"] = 16
    with pytest.raises(UserError, match="holds a run with batch_size = 32, not 16"):
        sweep_job.main(SweepConfig.model_validate(values))


def start(folder):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
    environment.pop("RAY_ADDRESS", None)
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.sweep", "killed.yaml"], cwd=folder, env=environment, stdout=log, stderr=log
        )


def kill(process):
    """SIGKILL for the driver; what it leaves behind ends by itself, or is killed too."""
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(left, timeout=3)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, timeout=10)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
