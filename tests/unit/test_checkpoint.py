"""Checkpoints: all that a run needs to go on comes back as it was, and nothing half-written is ever taken."""

import copy
import json

import numpy as np
import pytest
import torch

from rayclip.config import OptimizerConfig
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.inference.encoder import Encoder
from rayclip.inference.zero_shot import class_matrix
from rayclip.models.clip import CLIP
from rayclip.models.presets import with_logit_bias
from rayclip.training import checkpoint
from rayclip.training.checkpoint import (
    RunState,
    load_model,
    read_config,
    read_metrics,
    read_state,
    restore,
    write_checkpoint,
)
from rayclip.training.optimizer import build_optimizer
from rayclip.training.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "config.json", "metrics.json"}


def make_batch(seed):
    generator = np.random.default_rng(seed)
    lengths = np.array([4, 9, 6], dtype=np.int32)
    tokens = generator.integers(1, 2000, (3, 16), dtype=np.int32)
    return {
        "image": generator.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8),
        "tokens": np.where(np.arange(16) < lengths[:, None], tokens, 0).astype(np.int32),
        "num_tokens": lengths,
        "position": np.zeros(3, dtype=np.int64),
        "row": np.arange(3, dtype=np.int32),
        "cause": np.zeros(3, dtype=np.int8),
    }


def start(tiny_config, seed=0):
    torch.manual_seed(seed)
    model = CLIP(tiny_config)
    return model, build_optimizer(model, OptimizerConfig(lr=1e-2))


def train(model, optimizer, seeds):
    for seed in seeds:
        train_step(model, model, optimizer, make_batch(seed), 1e-2, None)


def state_of(model, optimizer):
    """Every tensor that the next step depends on."""
    tensors = {f"weight {name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {f"{slot} {name}": value for slot, value in optimizer.state.get(p, {}).items()}
    return copy.deepcopy(tensors)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


STATE = RunState(
    samples_seen=1234,
    steps=17,
    train_time_s=1.25,
    data_wait_s=0.5,
    skipped={"no_image": 3},
    ledger={"cursor": 4, "partial": {"5": "1f", "70": "8000000000000000"}},
    manifest_digest="abc",
)


@pytest.fixture
def written(tmp_path, tiny_config):
    """A checkpoint after two steps, and what it was made of."""
    model, optimizer = start(tiny_config)
    train(model, optimizer, [0, 1])
    folder = tmp_path / "samples-000000001234"
    config = {"name": "small", "model": tiny_config.model_dump(mode="json")}
    torch.manual_seed(99)
    torch.rand(5)
    write_checkpoint(folder, model, optimizer, STATE, config, {"tasks": {"letters": {"top1": 0.5}}})
    return folder, model, optimizer, config


def test_everything_comes_back_as_it_was(written, tiny_config):
    folder, model, optimizer, config = written
    next_numbers = torch.rand(5)
    other, other_optimizer = start(tiny_config, seed=1)
    assert restore(folder, other, other_optimizer) == STATE
    assert torch.equal(torch.rand(5), next_numbers)
    saved = state_of(model, optimizer)
    assert_equal(saved, state_of(other, other_optimizer))
    assert saved["used token_embedding.weight"].dtype == torch.bool
    assert 0 < saved["used token_embedding.weight"].sum() < 40
    assert read_state(folder) == STATE
    assert read_config(folder) == config
    assert read_metrics(folder) == {"tasks": {"letters": {"top1": 0.5}}}


def test_training_goes_on_bit_for_bit(written, tiny_config):
    folder, model, optimizer, _ = written
    other, other_optimizer = start(tiny_config, seed=1)
    restore(folder, other, other_optimizer)
    for pair in ((model, optimizer), (other, other_optimizer)):
        train(*pair, [2, 0, 3])
    assert_equal(state_of(model, optimizer), state_of(other, other_optimizer))


def test_a_checkpoint_before_the_first_step_can_be_restored(tmp_path, tiny_config):
    model, optimizer = start(tiny_config)
    write_checkpoint(tmp_path / "first", model, optimizer, RunState(), {}, {})
    other, other_optimizer = start(tiny_config, seed=1)
    assert restore(tmp_path / "first", other, other_optimizer) == RunState()
    assert_equal(state_of(model, optimizer), state_of(other, other_optimizer))


def test_a_logit_bias_is_part_of_the_model(tmp_path, tiny_config):
    config = with_logit_bias(tiny_config)
    model, optimizer = start(config)
    with torch.no_grad():
        model.logit_bias.fill_(-8.5)
    write_checkpoint(tmp_path / "biased", model, optimizer, RunState(), {"model": config.model_dump(mode="json")}, {})
    loaded = load_model(tmp_path / "biased")
    assert loaded.logit_bias.item() == -8.5
    encoder = Encoder(loaded, get_tokenizer(16), "cpu")
    assert encoder.logit_scale == pytest.approx(10)
    assert class_matrix(encoder, ["one", "two"], "a {}").shape == (2, config.embed_dim)


def test_load_model_gives_the_model(written):
    folder, model, _, _ = written
    loaded = load_model(str(folder))
    batch = {name: torch.from_numpy(array) for name, array in make_batch(5).items()}
    inputs = batch["image"], batch["tokens"], batch["num_tokens"]
    for got, expected in zip(loaded(*inputs), model(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_a_checkpoint_is_five_files_without_pickle(written):
    folder = written[0]
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for name in ("state", "config", "metrics"):
        json.loads((folder / f"{name}.json").read_text())


def test_writing_over_a_checkpoint_replaces_it_whole(written, tiny_config):
    folder = written[0]
    (folder / "left_over.txt").write_text("from before")
    model, optimizer = start(tiny_config, seed=3)
    write_checkpoint(folder, model, optimizer, RunState(samples_seen=5), {}, {})
    assert {path.name for path in folder.iterdir()} == FILES
    assert read_state(folder).samples_seen == 5
    assert_equal(state_of(model, optimizer), {f"weight {n}": p for n, p in load_weights(folder, tiny_config).items()})


def load_weights(folder, tiny_config):
    model, optimizer = start(tiny_config, seed=4)
    restore(folder, model, optimizer)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("fails_at", ["weights", "optimizer", "json"])
def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_new_name(written, monkeypatch, fails_at):
    folder, model, optimizer, config = written
    train(model, optimizer, [5])
    calls = []

    def save_file(tensors, path):
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) == {"weights": 1, "optimizer": 2, "json": 9}[fails_at]:
            raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    bad = {"metrics": object()} if fails_at == "json" else {}
    for target in (folder, folder.with_name("new")):
        calls.clear()
        with pytest.raises((OSError, TypeError)):
            write_checkpoint(target, model, optimizer, STATE, config, bad)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not folder.with_name("new").exists()
    assert {path.suffix for path in folder.parent.iterdir()} == {"", ".partial"}
    monkeypatch.undo()
    write_checkpoint(folder, model, optimizer, STATE, config, {})
    assert {path.name for path in folder.iterdir()} == FILES
    assert not folder.with_name(folder.name + ".partial").exists()


@pytest.mark.parametrize("read", [read_state, read_config, read_metrics, load_model])
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, read):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"^'.*' is not a checkpoint: no readable \w+\.json in it$"):
            read(folder)
    for name in ("state", "config", "metrics"):
        (tmp_path / f"{name}.json").write_text('{"cut')
    with pytest.raises(UserError, match="is not a checkpoint"):
        read(tmp_path)
