"""Options of a training step on two workers: bfloat16, compiled, averaged, and rolled back where a loss is high."""

import json

import numpy as np

from rayclip.cli import train as train_job
from rayclip.config import TrainConfig
from rayclip.data.decode import CAUSES
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.training.checkpoint import load_model, read_state

NUM_SAMPLES, EPOCHS = 200, 2


def test_a_run_with_all_options_ends_evaluated_with_an_exact_ledger(
    tmp_path, make_samples, write_dataset, make_config, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", make_samples(NUM_SAMPLES), shard_samples=50, chunk_samples=10)
    write_dataset(tmp_path / "pictures", make_samples(20, seed=1))
    (tmp_path / "pictures/classnames.txt").write_text("one\ntwo\nthree\n")
    config = make_config(
        "options",
        tmp_path / "data",
        batch_size=16,
        epochs=EPOCHS,
        optimizer={"lr": 1e-5},  # the loss stays about where it is
        precision="bfloat16",
        compile=True,
        ema={"half_life_samples": 100},
        guard={"action": "roll_back", "spike_threshold": 0.1, "window": 8, "max_interventions": 100},
        evaluation={
            "best": "classes.ema.top1",
            "tasks": {"classes": {"kind": "zero_shot", "path": str(tmp_path / "pictures")}},
        },
        checkpoint={"every_samples": 100, "record_samples": True, "keep": 100},
        tracking={"register_as": "options"},
        cluster={"num_workers": 2},
    )
    summary = train_job.main(TrainConfig.model_validate(config))
    left_out = summary["skipped"]["loss_spike"]
    assert left_out > 0  # any loss a little above the median is a spike here
    assert "went back to" in capsys.readouterr().err
    assert summary["samples_seen"] == EPOCHS * NUM_SAMPLES - left_out
    run = RunFolder(tmp_path / "runs/options")
    checkpoints = sorted(run.checkpoints.glob("samples-*"))
    assert read_state(checkpoints[-1]).interventions > 0
    samples = np.concatenate([np.load(folder / "samples.npy") for folder in checkpoints])
    assert len(np.unique(samples[:, :2], axis=0)) == len(samples) == EPOCHS * NUM_SAMPLES
    assert (samples[:, 2] == CAUSES.index("loss_spike")).sum() == left_out
    lines = [json.loads(line) for line in run.quarantine.read_text().splitlines()]
    assert [line["cause"] for line in lines] == ["loss_spike"] * left_out

    measured = summary["zero_shot"]["classes"]
    assert measured["ema"]["num_samples"] == measured["num_samples"] == 20
    average, own = (load_model(summary["checkpoint"], ema=ema).text_projection for ema in (True, False))
    assert average.isfinite().all() and not average.equal(own)
