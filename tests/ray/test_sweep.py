"""Sweeps on a real Ray and a real MLflow: one whose driver is killed, and one whose trials are stopped and fail."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image
from ray.util.placement_group import placement_group_table

from rayclip.cli import sweep as sweep_job
from rayclip.config import SweepConfig, TrainConfig
from rayclip.config.loader import load
from rayclip.errors import UserError
from rayclip.io.lease import hold
from rayclip.io.paths import storage_path
from rayclip.orchestration.sweep import driver as sweep_module
from rayclip.orchestration.sweep.trial import TrialTask, _train

ROOT = Path(__file__).resolve().parents[2]
PARENT = "mlflow.parentRunId"
LR = "optimizer.lr"
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


@pytest.fixture(scope="module")
def colours(tmp_path_factory, write_dataset):
    """Pictures of one colour each, which are soon learned, to train on and to evaluate; one cannot be read."""
    names = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    samples = []
    for i in range(192):
        name = list(names)[i % 3]
        file = io.BytesIO()
        Image.new("RGB", (20, 20), names[name]).save(file, "PNG")
        files = {"png": file.getvalue(), "txt": name.encode(), "cls": b"%d" % (i % 3)}
        samples.append({"__key__": f"{i:06}".encode(), **files})
    folder = tmp_path_factory.mktemp("colours")
    write_dataset(folder / "pictures", samples[:48])
    samples[100]["png"] = b"not a picture"
    write_dataset(folder / "train", samples, shard_samples=64, chunk_samples=16)
    (folder / "pictures/classnames.txt").write_text("\n".join(names) + "\n")
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
def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path, make_sweep, monkeypatch):
    plan = {"kind": "search", "space": {LR: {"low": 1e-4, "high": 1e-2, "log": True}}, "num_trials": 3}
    plan["algorithm"] = "tpe"
    config = make_sweep("killed", plan, 512) | {"max_concurrent": 1}
    (tmp_path / "killed.yaml").write_text(json.dumps(config))
    folder, log = tmp_path / "runs/sweeps/killed", tmp_path / "log"

    first = start(tmp_path)
    deadline = time.monotonic() + START_S
    wanted = folder / "trial-000/summary.json", folder / "trial-001/run.json"
    while not all(path.exists() for path in wanted) or (folder / "trial-000/owner.json").exists():
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    kill(first)
    finished = files_of(folder / "trial-000")
    parent, children = runs_of(tmp_path)
    assert children["trial-000"].info.status == "FINISHED"

    assert start(tmp_path).wait(START_S) == 0, log.read_text()
    assert files_of(folder / "trial-000") == finished
    parent_after, children_after = runs_of(tmp_path)
    assert parent_after.info.run_id == parent.info.run_id and parent_after.info.status == "FINISHED"
    assert children_after["trial-000"].to_dictionary() == children["trial-000"].to_dictionary()
    assert children_after["trial-001"].info.run_id == children["trial-001"].info.run_id
    assert {name: run.info.status for name, run in children_after.items()} == {
        "trial-000": "FINISHED",
        "trial-001": "FINISHED",
        "trial-002": "FINISHED",
    }
    rows = rows_of(folder / "trials.csv")
    assert [row["status"] for row in rows.values()] == ["finished"] * 3
    assert {row["samples"] for row in rows.values()} == {"510"}, "two epochs without the one that cannot be read"
    assert {row["unique_samples"] for row in rows.values()} == {"256"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_finished"] == 3 and summary["share_saved"] == 0

    # One more trial is thought of with what all three came to, whoever was the driver then.
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(sweep_module, "suggest", lambda plan, index, known: asked.append((index, known)) or {LR: 1e-3})
    four = SweepConfig.model_validate(config | {"plan": plan | {"num_trials": 4}})
    with hold(storage_path(folder), "the sweep") as lease:
        sweep_module.Sweep(four, lease)._suggested()
    values = [json.loads(line)["values"] for line in (folder / "journal.jsonl").read_text().splitlines()][:3]
    assert [value[LR] for value in values] == pytest.approx([float(row[LR]) for row in rows.values()])
    known = [(value, float(row["classes.top1"])) for value, row in zip(values, rows.values(), strict=True)]
    assert asked == [(3, known)]


def test_asha_stops_a_trial_at_its_evaluation_and_a_mistake_is_told_not_retried(
    tmp_path, colours, make_sweep, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    space = {
        "optimizer.lr": {"choices": [1e-2, 1e-9]},
        "data.max_bad_fraction": {"choices": [0.5, 0.0]},
    }
    plan = {"kind": "search", "space": space, "num_trials": 3, "algorithm": "asha", "seed": 65}
    plan |= {"grace_samples": 256, "reduction_factor": 2, "stop_by": "classes.percentile_rank"}
    values = make_sweep(
        "asha", plan, 1024, data={"path": str(colours / "train")}, batch_size=16, optimizer={"warmup_samples": 0}
    )
    values["max_concurrent"] = 1
    task = {"kind": "zero_shot", "path": str(colours / "pictures")}
    values["base"]["evaluation"] = {"every_samples": 256, "tasks": {"classes": task}}
    with pytest.raises(UserError, match=r"1 of 3 trials failed: trial-002: .*samples could not be read"):
        sweep_job.main(SweepConfig.model_validate(values))

    folder = tmp_path / "runs/sweeps/asha"
    summary = json.loads((folder / "summary.json").read_text())
    rows = rows_of(folder / "trials.csv")
    assert [row["status"] for row in rows.values()] == ["finished", "stopped", "failed"]
    checkpoints = (folder / "trial-001/checkpoints").glob("samples-*")
    assert int(rows["trial-001"]["samples"]) == max(int(path.name[-12:]) for path in checkpoints) < 1000
    spent = sum(int(row["samples"]) for row in rows.values() if row["samples"])
    assert 0.3 < summary["share_saved"] <= 1 - spent / (3 * 1024) + 0.01
    _, children = runs_of(tmp_path)
    expected = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    assert {name: run.info.status for name, run in children.items()} == {
        name: expected[row["status"]] for name, row in rows.items()
    }
    assert summary["best"]["trial"] == "trial-000" and summary["best"]["classes.top1"] > 0.9
    config = load(TrainConfig, folder / "best.yaml", [])
    assert config.optimizer.lr == summary["best"]["values"]["optimizer.lr"]
    assert config.tracking.parent_run_id is None

    before = files_of(folder)
    with pytest.raises(UserError, match="trials failed"):
        sweep_job.main(SweepConfig.model_validate(values))  # it tries the failed ones again, and nothing else
    after = files_of(folder)
    for row in rows.values():
        if row["status"] != "failed":
            assert {p: f for p, f in after.items() if row["name"] in p.parts} == {
                p: f for p, f in before.items() if row["name"] in p.parts
            }
    values["base"]["batch_size"] = 8
    with pytest.raises(UserError, match="holds a run with batch_size = 16, not 8"):
        sweep_job.main(SweepConfig.model_validate(values))


def test_a_trial_whose_log_cannot_be_written_fails_and_keeps_nobody_waiting(tmp_path, data, make_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/logs").write_text("a file where the folder of logs would be")
    evaluation = {"every_samples": 64, "tasks": {"classes": {"kind": "zero_shot", "path": str(data / "pictures")}}}
    config = make_config("unheard", data / "train", samples=256, evaluation=evaluation, cluster={"num_workers": 2})
    trial = _train(TrialTask("unheard", (TrainConfig.model_validate(config),), (0,), awaits_decision=True))
    with pytest.raises(FileExistsError, match="runs/logs"):
        list(trial)
    placed = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert not placed, "the workers have ended, and their place is free for the next try"


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
