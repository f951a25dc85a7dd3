"""Training processes killed on purpose: what is left of the run goes on, and every sample counts once."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from rayclip.cli import train as train_job
from rayclip.config import TrainConfig
from rayclip.data.manifest import Manifest
from rayclip.data.order import Order
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.models.weights import Weights, write_weights
from rayclip.training.checkpoint import load_model

pytestmark = pytest.mark.chaos

EPOCHS = 6
NUM_SAMPLES = 1000
WINDOW = 4
EVALUATE_EVERY = 3000
LOG_EVERY = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_samples, write_dataset):
    """A data set whose epochs end in the middle of batches, windows and checkpoints."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, make_samples(NUM_SAMPLES), shard_samples=150, chunk_samples=16)
    return folder


def test_a_killed_worker_and_a_killed_driver_lose_and_repeat_nothing(
    tmp_path, data, make_samples, write_dataset, make_config, start_training
):
    write_dataset(tmp_path / "pictures", make_samples(40, seed=1))
    (tmp_path / "pictures/classnames.txt").write_text("one\ntwo\nthree\n")
    config = make_config(
        "chaos",
        data,
        data={"shuffle_window": WINDOW},
        epochs=EPOCHS,
        evaluation={
            "every_samples": EVALUATE_EVERY,
            "best": "classes.top1",
            "tasks": {"classes": {"kind": "zero_shot", "path": str(tmp_path / "pictures")}},
        },
        checkpoint={"every_samples": 480, "keep": 1000, "record_samples": True},
        tracking={"log_every_samples": LOG_EVERY, "register_as": "chaos"},
        cluster={"num_workers": 2},
    )

    training = start_training(tmp_path, config)
    training.wait_until(in_mid_epoch)
    workers = training.worker_pids()
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    at_first_kill = training.latest()["samples_seen"]
    # Three checkpoints on, new workers are at it: the ones of before may have written one more as it died.
    at_second_kill = training.wait_until(lambda s: in_mid_epoch(s) and s["samples_seen"] > at_first_kill + 3 * 480)
    assert not set(workers) & set(training.worker_pids()), "all workers start anew"
    training.kill()
    assert at_second_kill["samples_seen"] < EPOCHS * NUM_SAMPLES - 480

    training = start_training(tmp_path, config)
    assert training.end() == 0, training.log.read_text()
    assert "going on with run 'chaos' from " in training.log.read_text()

    lineage = lineage_of(training.checkpoints)
    check_samples(lineage, Manifest.load(data), config["seed"])
    check_tracking(tmp_path, config, [state["samples_seen"] for _, state, _ in lineage])
    check_summary(json.loads((tmp_path / "runs/chaos/summary.json").read_text()))


def test_a_second_launch_is_refused_and_what_a_signal_stops_is_saved(tmp_path, data, make_config, start_training):
    config = make_config(
        "owned",
        data,
        data={"shuffle_window": WINDOW},
        epochs=EPOCHS,
        checkpoint={"every_samples": 480, "keep": 1000, "record_samples": True},
    )
    training = start_training(tmp_path, config)
    training.wait_until(lambda state: state["samples_seen"] > 500)
    second = subprocess.run(
        [sys.executable, "-m", "rayclip", "train", str(tmp_path / "owned.yaml")],
        cwd=tmp_path, env=training.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert second.returncode == 2
    holder = (
        f"one at a time: run 'owned' is held by process {training.process.pid} on host {socket.gethostname()} since"
    )
    assert second.stderr.splitlines()[-1].startswith(f"error: {holder} 20")

    training.process.send_signal(signal.SIGTERM)
    assert training.end() == 143, training.log.read_text()
    saved = training.latest()["samples_seen"]
    assert f"stopped: saved at {saved:,} samples" in training.log.read_text()
    assert saved < EPOCHS * NUM_SAMPLES

    training = start_training(tmp_path, config)
    assert training.end() == 0, training.log.read_text()
    assert f"going on with run 'owned' from {saved:,} samples" in training.log.read_text()
    lineage = lineage_of(training.checkpoints)
    assert saved in [state["samples_seen"] for _, state, _ in lineage]
    check_samples(lineage, Manifest.load(data), config["seed"])


def test_a_run_with_every_option_goes_on_too(
    tmp_path, data, tiny_config, make_samples, write_dataset, make_config, start_training
):
    write_dataset(tmp_path / "pairs", make_samples(40, seed=1))
    torch.manual_seed(7)
    start = CLIP(tiny_config)
    write_weights(tmp_path / "start", Weights(tiny_config, start.state_dict(), ""), "open_clip", "start")
    config = make_config(
        "options",
        data,
        data={"shuffle_window": WINDOW},
        epochs=EPOCHS,
        weights=str(tmp_path / "start"),
        lock="image",
        loss={"kind": "sigmoid", "distribution": "ring", "tile_size": 8},
        micro_batch_size=6,
        activation_checkpointing=True,
        precision="bfloat16",
        compile=True,
        ema={"half_life_samples": 500},
        guard={"action": "roll_back"},
        evaluation={
            "best": "pairs.ema.image_to_text.recall_at_1",
            "tasks": {"pairs": {"kind": "retrieval", "path": str(tmp_path / "pairs")}},
        },
        checkpoint={"every_samples": 480, "keep": 1000, "record_samples": True},
        cluster={"num_workers": 2},
    )
    training = start_training(tmp_path, config)
    training.wait_until(in_mid_epoch)
    training.kill()
    training = start_training(tmp_path, config)
    assert training.end() == 0, training.log.read_text()
    assert "going on with run 'options' from " in training.log.read_text()

    check_samples(lineage_of(training.checkpoints), Manifest.load(data), config["seed"])
    summary = json.loads((tmp_path / "runs/options/summary.json").read_text())
    measured = summary["retrieval"]["pairs"]
    assert measured["num_texts"] == measured["ema"]["num_texts"] == 40
    ends, average = (load_model(summary["checkpoint"], ema=ema).state_dict() for ema in (False, True))
    assert all(torch.equal(ends[name], tensor) for name, tensor in start.visual.state_dict(prefix="visual.").items())
    assert not torch.equal(ends["text_projection"], start.text_projection)
    assert not torch.equal(ends["text_projection"], average["text_projection"])
    assert -11 < ends["logit_bias"].item() < -9 and ends["logit_bias"].item() != -10


def in_mid_epoch(state):
    """Whether a checkpoint lies well inside an epoch, some of whose samples are done out of turn or half done."""
    return 0 < state["samples_seen"] % NUM_SAMPLES < NUM_SAMPLES - 100 and state["ledger"]["partial"]


def lineage_of(checkpoints):
    """(folder, state, samples [n, 3]) of each checkpoint from the first to the last, each grown from the one before.

    Every checkpoint that is listed or lies there must be among them: a restart goes on from the last one.
    """
    found = {}
    for folder in checkpoints.glob("samples-*"):
        state = json.loads((folder / "state.json").read_text())
        found[state["samples_seen"] + sum(state["skipped"].values())] = folder, state, np.load(folder / "samples.npy")
    snapshot = json.loads((checkpoints / "checkpoint_manager_snapshot.json").read_text())
    listed = Counter(result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"])
    assert listed == Counter(folder.name for folder, _, _ in found.values()), "each checkpoint is listed, and once"
    lineage, at = [], max(found)
    while at:
        lineage.append(found.pop(at))
        at -= len(lineage[-1][2])
        assert not at or at in found, f"a checkpoint goes on from {at:,} samples, and there is none"
    assert not found, "a checkpoint that nothing goes on from"
    return lineage[::-1]


def check_samples(lineage, manifest, seed):
    """Each row of each chunk of each epoch once, by the records of the lineage and by its last ledger."""
    positions, rows, causes = np.concatenate([samples for _, _, samples in lineage]).T
    assert not causes.any()
    epochs = positions // len(manifest)
    chunks = Order(seed, len(manifest), WINDOW).chunks(positions)
    expected = {(c, r): 1 for c, num_rows in enumerate(manifest.num_samples.tolist()) for r in range(num_rows)}
    for epoch in range(EPOCHS):
        here = epochs == epoch
        assert Counter(zip(chunks[here].tolist(), rows[here].tolist(), strict=True)) == expected
    assert len(positions) == EPOCHS * NUM_SAMPLES
    last = lineage[-1][1]
    assert last["samples_seen"] == EPOCHS * NUM_SAMPLES
    assert last["skipped"] == {}
    assert last["ledger"] == {"cursor": EPOCHS * len(manifest), "partial": {}}


def check_tracking(folder, config, checkpoint_steps):
    """One MLflow run, its curves without a gap or a double, a model for each checkpoint."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(config["tracking"]["experiment"])
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"

    total = EPOCHS * NUM_SAMPLES
    keys = [key for key in run.data.metrics if key.startswith(("train/", "evaluation/", "checkpoint/"))]
    steps = {key: [point.step for point in client.get_metric_history(run.info.run_id, key)] for key in keys}
    assert {"train/loss", "train/learning_rate", "evaluation/classes.top1", "checkpoint/classes.top1"} <= set(steps)
    for key, of_key in steps.items():
        assert (np.diff(of_key) > 0).all(), f"{key} has a step twice or goes back: {of_key}"
    assert set(np.diff([0, *steps["train/loss"]]).tolist()) == {LOG_EVERY}
    assert steps["train/loss"][-1] > total - LOG_EVERY
    evaluated = [step for step in checkpoint_steps if step // EVALUATE_EVERY != (step - 32) // EVALUATE_EVERY]
    assert steps["evaluation/classes.top1"] == steps["checkpoint/classes.top1"] == evaluated
    assert evaluated[-1] == total

    models = client.search_logged_models([experiment.experiment_id])
    assert sorted(int(model.tags["samples_seen"]) for model in models) == checkpoint_steps
    assert {str(model.status) for model in models} == {"READY"}
    assert len(client.search_model_versions("name = 'chaos'")) == 1


def check_summary(summary):
    """What programs read covers the whole run, not its last leg."""
    assert summary["samples_seen"] == EPOCHS * NUM_SAMPLES
    assert summary["steps"] == -(-EPOCHS * NUM_SAMPLES // 32)
    assert summary["zero_shot"]["classes"]["num_samples"] == 40
    assert summary["model_version"] == 1
    assert summary["skipped"] == {}
    assert summary["train_time_s"] > 0


def test_one_worker_ends_with_the_same_bits_whether_it_was_killed_or_not(
    tmp_path, data, make_samples, write_dataset, make_config, start_training, monkeypatch
):
    own_data = tmp_path / "data"
    write_dataset(own_data, make_samples(500))
    sections = {"epochs": 8, "checkpoint": {"every_samples": 700, "keep": 1000}}
    monkeypatch.chdir(tmp_path)

    config = make_config("killed", own_data, **sections)
    training = start_training(tmp_path, config)
    at_kill = training.wait_until(lambda s: s["samples_seen"] >= 1400)
    training.kill()
    assert at_kill["samples_seen"] < 8 * 500

    write_dataset(own_data, make_samples(500, seed=9))
    with pytest.raises(UserError, match="is not the one that run 'killed' began with"):
        train_job.main(TrainConfig.model_validate(config))
    write_dataset(own_data, make_samples(500))

    # It goes on elsewhere: in this process, on another Ray.
    killed = train_job.main(TrainConfig.model_validate(config))
    whole = train_job.main(TrainConfig.model_validate(make_config("whole", own_data, **sections)))

    assert killed["samples_seen"] == whole["samples_seen"] == 8 * 500
    assert killed["checkpoint_samples_seen"] == 8 * 500
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (
            (tmp_path / "runs" / name / "checkpoints/samples-000000004000" / file).read_bytes()
            for name in ("killed", "whole")
        )
        assert one == other, file
