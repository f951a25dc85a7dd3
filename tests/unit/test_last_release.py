"""A checkpoint and a config of the last release, under today's code."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from rayclip.config import TrainConfig
from rayclip.config.loader import load, read_record
from rayclip.orchestration.train.plan import resolve
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.training.checkpoint import load_model, read_config, restore
from rayclip.training.optimizer import build_optimizer
from tests import last_release


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return last_release.unpack(tmp_path_factory.mktemp("last_release"))


def test_its_checkpoint_loads(run):
    folder = run / last_release.CHECKPOINT
    weights = folder / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == last_release.WEIGHTS_AT[416]
    model = load_model(folder)
    there = load_file(weights)
    assert model.state_dict().keys() == there.keys()
    assert all(torch.equal(tensor, there[name]) for name, tensor in model.state_dict().items())

    before = torch.get_rng_state()
    config = read_record(TrainConfig, read_config(folder), "config.json")
    optimizer = build_optimizer(model, config.optimizer)
    state = restore(folder, model, optimizer)
    moments = load_file(folder / "optimizer.safetensors")
    assert torch.equal(torch.get_rng_state(), moments["torch_random_state"])
    torch.set_rng_state(before)
    assert (state.samples_seen, state.steps, state.ledger["cursor"]) == (416, 13, 0)
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state[parameter].items():
            assert torch.equal(value, moments[f"{name}|{slot}"])


def test_its_record_is_the_run_of_its_config(run, tmp_path, monkeypatch, capsys):
    """Read in the folder that it was trained in, the same file names the same run."""
    record = json.loads((run / "run.json").read_text())
    assert record["mlflow_run_id"] == last_release.MLFLOW_RUN and record["config"]["evaluation"]["beside"] is False
    monkeypatch.chdir(tmp_path)
    config = resolve(load(TrainConfig, last_release.CONFIG, ["name=killed"]))
    assert [line.split("'")[1] for line in capsys.readouterr().err.splitlines()] == [
        "evaluation.beside",
        "evaluation.beside_cpus",
    ]
    settings = json.loads(config.model_dump_json().replace(str(tmp_path), last_release.TRAINED_IN))
    RunFolder(run).check_same(record, settings)
    assert capsys.readouterr().err == ""
