"""A run whose data, folder, checkpoints and artifacts are in S3, with faults put in, killed and started again."""

import io

import numpy as np
import pytest

from rayclip import storage

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
        evaluation={"tasks": {"pairs": {"kind": "retrieval", "path": "s3://data/set"}}},
        tracking={
            "uri": f"sqlite:///{tmp_path}/mlflow.db", "artifacts": "s3://data/mlflow", "register_as": "from-s3",
        },
    )  # fmt: skip


@pytest.mark.chaos
def test_a_run_in_s3_goes_on_after_kill_9_with_faults_and_nothing_is_left_on_disk(start_training, config, s3, tmp_path):
    s3.rate, s3.slow_s, s3.commands = 0.05, 2.0, ("GET", "PUT", "POST")
    first = start_training(tmp_path, config)
    first.wait_until(lambda state: state["samples_seen"] >= 3 * EVERY)
    first.kill()
    start = first.latest()["samples_seen"]
    again = start_training(tmp_path, config)
    assert again.end() == 0, again.log.read_text()
    s3.rate = 0.0
    print(s3.faults, start)
