"""The training job in the tests' own process, on a real Ray and a real MLflow database."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from rayclip.cli import train as train_job
from rayclip.cli.command import run_and_exit
from rayclip.config import TrainConfig
from rayclip.data.manifest import Manifest
from rayclip.data.order import Order
from rayclip.errors import UserError
from rayclip.orchestration.train import stream
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.training.checkpoint import load_model

NUM_SAMPLES = 300
CHUNK = 10
EPOCHS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_samples, write_dataset):
    """(folder, bad samples as a Counter of (cause, shard, row)): some of every kind of bad sample."""
    folder = tmp_path_factory.mktemp("data")
    samples = make_samples(NUM_SAMPLES)
    bad = Counter()

    def spoil(at, cause, **files):
        samples[at].update(files)
        for extension in [key for key, value in files.items() if value is None]:
            del samples[at][extension]
        bad[cause, f"{at // 50:06}.tar", at % CHUNK] += 1

    spoil(0, "image_undecodable", png=b"not a picture")
    spoil(57, "image_undecodable", png=samples[57]["png"][:60])
    spoil(58, "image_undecodable", png=b"")
    spoil(120, "caption_empty", txt=b" \n")
    spoil(121, "caption_not_utf8", txt=b"\xff\xfe\xfa")
    spoil(199, "no_caption", txt=None)
    spoil(299, "no_image", png=None)
    manifest = write_dataset(folder, samples, shard_samples=50, chunk_samples=CHUNK)

    chunk = 17  # a chunk whose bytes are no tar any more, in a file that has kept its size
    with (folder / "000003.tar").open("r+b") as shard:
        shard.seek(int(manifest.offset[chunk]))
        shard.write(b"\xaa" * int(manifest.length[chunk]))
    bad.update({("chunk_unreadable", "000003.tar", row): 1 for row in range(CHUNK)})
    return folder, bad


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_samples, write_dataset):
    """A data set to evaluate on, for both tasks."""
    folder = tmp_path_factory.mktemp("pictures")
    write_dataset(folder, make_samples(40, seed=1))
    (folder / "classnames.txt").write_text("one\ntwo\nthree\n")
    return folder


def test_a_run_with_bad_samples_from_data_to_a_registered_version(
    tmp_path, data, images, make_config, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream, "SEGMENT_WINDOWS", 5)  # of eight
    folder, bad = data
    config = make_config(
        "smoke",
        folder,
        data={"max_bad_fraction": 0.1},
        epochs=EPOCHS,
        evaluation={
            "best": "classes.top1",
            "tasks": {
                "classes": {"kind": "zero_shot", "path": str(images)},
                "captions": {"kind": "retrieval", "path": str(images)},
            },
        },
        checkpoint={"every_samples": 250},
        tracking={"register_as": "smoke"},
        cluster={"num_workers": 2},
    )
    summary = train_job.main(TrainConfig.model_validate(config))
    output = capsys.readouterr()
    assert "model version" in output.out
    assert "smoke version 1" in output.out

    assert {"top1", "top5", "num_classes", "num_samples"} <= set(summary["zero_shot"]["classes"])
    assert summary["zero_shot"]["classes"]["num_samples"] == summary["retrieval"]["captions"]["num_texts"] == 40
    assert {"train_time_s", "samples_per_s", "mlflow_run_id"} <= set(summary)
    assert 0 <= summary["data_wait_share"] <= 1
    assert summary["samples_seen"] == EPOCHS * (NUM_SAMPLES - bad.total())
    assert summary["model_version"] == 1
    run = RunFolder(tmp_path / "runs/smoke")
    assert json.loads(run.summary.read_text()) == json.loads(json.dumps(summary))

    causes = Counter()
    for cause, _, _ in bad:
        causes[cause] += EPOCHS
    assert summary["skipped"] == causes
    lines = [json.loads(line) for line in run.quarantine.read_text().splitlines()]
    assert Counter((line["cause"], line["shard"], line["row"]) for line in lines) == dict.fromkeys(bad, EPOCHS)
    assert len({(line["position"], line["row"]) for line in lines}) == len(lines)

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    tags = client.get_run(summary["mlflow_run_id"]).data.tags
    assert summary["code_version"] == tags["code_version"] != ""
    version = client.get_model_version_by_alias("smoke", "champion")
    assert int(version.version) == 1
    assert load_model(summary["checkpoint"]).logit_scale.exp() > 0

    assert f"MLflow run {summary['mlflow_run_id']} in " in output.err
    check_the_page_of_the_run(client, summary["mlflow_run_id"])
    check_that_a_second_run_changes_nothing(config, summary, tmp_path, client, capsys)


def check_the_page_of_the_run(client, run_id):
    run = client.get_run(run_id)
    assert "million parameters" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["mlflow.source.name"] == "rayclip train smoke"
    assert run.data.metrics["loss"] == run.data.metrics["train/loss"]
    assert run.data.params["evaluation/classes.num_classes"] == "3"
    assert "evaluation/classes.num_classes" not in run.data.metrics
    contexts = {tag.value for one in run.inputs.dataset_inputs for tag in one.tags}
    assert contexts == {"training", "evaluation"}
    images = {file.path for file in client.list_artifacts(run_id, "pictures")}
    assert {"pictures/training_samples.png", "pictures/classes.png"} <= images


def check_that_a_second_run_changes_nothing(config, summary, folder, client, capsys):
    before = files_of(folder / "runs"), client.get_run(summary["mlflow_run_id"]).to_dictionary()
    assert train_job.main(TrainConfig.model_validate(config)) == json.loads(json.dumps(summary))
    assert "run 'smoke' is complete already" in capsys.readouterr().err
    assert (files_of(folder / "runs"), client.get_run(summary["mlflow_run_id"]).to_dictionary()) == before
    assert len(client.search_model_versions("name = 'smoke'")) == 1


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_too_many_bad_samples_end_the_run_with_one_line(tmp_path, data, make_config, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = make_config("bad", data[0], epochs=1, data={"max_bad_fraction": 0.02}, cluster={"num_workers": 2})
    (tmp_path / "bad.yaml").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["rayclip", "bad.yaml"])
    with pytest.raises(SystemExit) as caught:
        run_and_exit(train_job.command)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "samples could not be read (" in errors[0]
    assert "data.max_bad_fraction allows 0.02" in errors[0]
    assert "Traceback" not in err
    assert not (tmp_path / "runs/bad/summary.json").exists()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.status == "FAILED"


def test_two_workers_with_the_sigmoid_loss_around_a_ring_in_micro_batches_on_a_mixture(
    tmp_path, images, make_samples, write_dataset, make_config, monkeypatch
):
    """And with activations computed anew; the bias that this loss needs comes by itself and is in the checkpoint."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "others", make_samples(20, seed=2), shard_samples=20)
    mixture = [{"path": str(images)}, {"path": "others", "weight": 1.5}]
    config = make_config(
        "sigmoid",
        images,
        data={"path": None, "mixture": mixture},
        epochs=2,
        batch_size=20,
        micro_batch_size=4,
        activation_checkpointing=True,
        loss={"kind": "sigmoid", "distribution": "ring"},
        evaluation={"tasks": {"classes": {"kind": "zero_shot", "path": str(images)}}},
        checkpoint={"record_samples": True},
        cluster={"num_workers": 2},
    )
    summary = train_job.main(TrainConfig.model_validate(config))
    assert summary["zero_shot"]["classes"]["num_samples"] == 40
    model = load_model(summary["checkpoint"])
    assert -10.5 < model.logit_bias.item() < -9.5 and model.logit_bias.item() != -10
    assert model.logit_scale.exp().item() == pytest.approx(10, rel=0.05)
    check_mixture(tmp_path, config, summary)


def check_mixture(folder, config, summary):
    """An epoch has the 40 pictures once, the 20 others once, and the half of their chunks once more."""
    assert summary["samples_seen"] == 2 * (40 + 20 + 10)
    assert summary["unique_samples"] == 60
    first, second = (Manifest.load(part["path"]) for part in config["data"]["mixture"])
    slots = len(first) + len(second) + len(second) // 2
    positions, rows, causes = np.load(f"{summary['checkpoint']}/samples.npy").T
    assert not causes.any()
    counts = np.concatenate([first.num_samples, second.num_samples])
    chunks = Order(config["seed"], ((len(first), 1.0), (len(second), 1.5))).chunks(np.arange(2 * slots))
    planned = {(position, row) for position, chunk in enumerate(chunks) for row in range(counts[chunk])}
    assert sorted(zip(positions.tolist(), rows.tolist(), strict=True)) == sorted(planned)
    for epoch in range(2):
        here = chunks[positions[positions // slots == epoch]]
        assert (here < len(first)).sum() == 40
        assert (here >= len(first)).sum() == 30

    parts = [(config["data"]["mixture"][0]["path"], 1.0, 40), (str(folder / "others"), 1.5, 20)]
    expected = [dict(zip(("path", "weight", "samples"), part, strict=True)) for part in parts]
    assert json.loads((folder / "runs/sigmoid/run.json").read_text())["data"] == expected
    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    assert json.loads(client.get_run(summary["mlflow_run_id"]).data.tags["data_parts"]) == expected


def test_an_error_that_repeats_at_the_same_place_is_tried_twice(tmp_path, images, make_config, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.model_validate(make_config("again", images, epochs=1, cluster={"max_failures": 5}))
    summary = train_job.main(config)
    (tmp_path / "runs/again/summary.json").write_text(json.dumps(summary | {"manifest_digest": "0", "checkpoint": "x"}))
    train_job.main(config)
    said = capsys.readouterr().err
    assert "run 'again' is complete already; its data set has changed since, and it was not trained on" in said
    assert "; its checkpoint 'x' is gone" in said
    (tmp_path / "runs/again/summary.json").unlink()
    (Path(summary["checkpoint"]) / "optimizer.safetensors").write_bytes(b"a damaged checkpoint")
    with pytest.raises(
        UserError, match=r"failed twice in the same way at 0 samples seen.*: SafetensorError: "
    ) as raised:
        train_job.main(config)
    assert "\n" not in str(raised.value)
