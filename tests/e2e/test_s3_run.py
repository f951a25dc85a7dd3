"""A run whose data, folder, checkpoints and artifacts are in S3, with faults put in, killed and started again."""

import io
import json
import os

import numpy as np
import pytest
import torch

from benchmarks.faulty_s3 import READ_FAULTS, WRITE_FAULTS
from rayclip.config import TrainConfig
from rayclip.io import storage
from rayclip.orchestration.train.driver import run_training
from rayclip.tracking.registry import resolve_model
from rayclip.training.checkpoint import load_model

NUM_SAMPLES, EPOCHS, EVERY = 96, 10, 192
TOTAL = NUM_SAMPLES * EPOCHS


def upload(folder, address):
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        storage.write_bytes(f"{address}/{path.relative_to(folder)}", path.read_bytes())


def samples_of(checkpoints):
    """The samples between a checkpoint and the one before, by the checkpoint's name."""
    names = [file.name for file in storage.list_files(str(checkpoints)) if file.name.endswith("samples.npy")]
    return {name: np.load(io.BytesIO((checkpoints / name).read_bytes())) for name in names}


@pytest.fixture
def config(make_config, make_samples, write_dataset, s3, tmp_path):
    write_dataset(tmp_path / "set", make_samples(NUM_SAMPLES))
    upload(tmp_path / "set", "s3://data/set")
    return make_config(
        "killed", "s3://data/set",
        runs="s3://data/runs", epochs=EPOCHS, batch_size=16,
        checkpoint={"every_samples": EVERY, "keep": 2, "record_samples": True},
        evaluation={
            "tasks": {"pairs": {"kind": "retrieval", "path": "s3://data/set"}},
            "every_samples": 2 * EVERY, "asynchronous": True,
        },
        tracking={
            "uri": f"sqlite:///{tmp_path}/mlflow.db", "artifacts": "s3://data/mlflow", "register_as": "from-s3",
        },
    )  # fmt: skip


@pytest.mark.chaos
def test_a_run_in_s3_goes_on_after_kill_9_with_faults_and_nothing_is_lost(
    start_training, config, s3, tmp_path, monkeypatch
):
    s3.rate, s3.slow_s, s3.commands = 0.05, 2.0, ("GET", "PUT", "POST")
    config["checkpoint"]["keep"] = 100
    first = start_training(tmp_path, config)
    first.wait_until(lambda state: state["samples_seen"] >= 3 * EVERY)
    first.kill()
    start, before = first.latest()["samples_seen"], samples_of(first.checkpoints)
    config["checkpoint"]["keep"] = 2
    again = start_training(tmp_path, config)
    assert again.end() == 0, again.log.read_text()
    s3.rate = 0.0
    assert sum(s3.faults[fault] for fault in READ_FAULTS) and sum(s3.faults[fault] for fault in WRITE_FAULTS)
    assert f"going on with run 'killed' from {start:,} samples" in again.log.read_text()

    after = samples_of(again.checkpoints)
    assert len(after) <= 2, "the others are pruned"
    number = {name: int(name.partition("/")[0].removeprefix("samples-")) for name in before | after}
    trained = [samples for name, samples in before.items() if number[name] <= start]
    trained += [samples for name, samples in after.items() if number[name] > start]
    every = [tuple(sample) for samples in trained for sample in samples[:, :2].tolist()]
    assert len(every) == len(set(every)) == TOTAL, "each sample of each epoch once"

    kept = [json.loads((again.checkpoints / name.replace("samples.npy", "metrics.json")).read_text()) for name in after]
    assert [content["measured"] for content in kept] == [True, True], "the last but one beside training"
    assert f"at {4 * EVERY:,} samples: pairs" in again.log.read_text()

    summary = json.loads(storage.read_bytes("s3://data/runs/killed/summary.json"))
    assert summary["samples_seen"] == TOTAL and not summary["skipped"]
    assert run_training(TrainConfig.model_validate(config)) == summary, "complete already"
    assert not (tmp_path / "runs").exists() and not list(tmp_path.rglob("s3:*"))

    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "cache"))
    registered = resolve_model("models:/from-s3@champion", config["tracking"]["uri"]).folder
    assert any(file.name.endswith("model.safetensors") for file in storage.list_files("s3://data/mlflow"))
    checkpoint = resolve_model(summary["checkpoint"], None).folder
    weights = [load_model(folder).state_dict() for folder in (registered, checkpoint)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    everything = [storage.read_bytes(f"s3://data/{file.name}") for file in storage.list_files("s3://data")]
    everything += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret in content for content in everything)
