"""A run that was killed under the last release goes on under today's code."""

import hashlib
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rayclip.cli import ingest as ingest_job
from rayclip.cli import train as train_job
from rayclip.config import IngestConfig, ShapesConfig, TrainConfig
from rayclip.config.loader import load
from rayclip.tracking.mlflow import connect, resolve_uri
from rayclip.training.checkpoint import read_state
from tests import last_release


@pytest.fixture
def killed_run(tmp_path, monkeypatch):
    """The folder of the run, moved here with its data and its MLflow run by someone who put the paths in it right."""
    monkeypatch.chdir(tmp_path)
    ingest_job.main(IngestConfig(source=ShapesConfig(train=400, test=60), output="data/shapes"))
    folder = last_release.unpack(tmp_path / "runs" / "killed")
    client = connect(resolve_uri(None))
    artifacts = (tmp_path / "mlflow/artifacts/rayclip").as_uri()
    experiment = client.create_experiment("rayclip", artifact_location=artifacts)
    run = client.create_run(experiment, run_name="killed")
    for path in (folder / "run.json", folder / last_release.CHECKPOINT / "config.json"):
        text = path.read_text().replace(last_release.TRAINED_IN, str(tmp_path))
        path.write_text(text.replace(last_release.MLFLOW_RUN, run.info.run_id))
    return folder


def test_it_ends_with_the_bits_that_the_last_release_ended_with(killed_run, capsys):
    config = load(TrainConfig, last_release.CONFIG, ["name=killed"])
    summary = train_job.main(config)
    assert "going on with run 'killed' from 416 samples" in capsys.readouterr().err
    state = read_state(Path(summary["checkpoint"]))
    assert (state.samples_seen, state.steps, summary["skipped"]) == (1600, 50, {})
    if last_release.same_arithmetic():
        weights = (Path(summary["checkpoint"]) / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == last_release.WEIGHTS_AT[1600]

    client = MlflowClient(resolve_uri(None))
    runs = client.search_runs([client.get_experiment_by_name("rayclip").experiment_id])
    assert [run.info.run_id for run in runs] == [summary["mlflow_run_id"]]
    assert runs[0].info.status == "FINISHED"
    assert json.loads((killed_run / "run.json").read_text())["mlflow_run_id"] == summary["mlflow_run_id"]
    assert summary["registered_model"] == "tiny" and summary["model_version"] is not None
