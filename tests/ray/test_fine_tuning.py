"""A run of two workers that starts from exported weights, one tower locked."""

import pytest
import torch

from rayclip.cli import convert, embed
from rayclip.cli import train as train_job
from rayclip.config import ConvertConfig, EmbedConfig, TrainConfig
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.models.weights import Weights, write_weights
from rayclip.training.checkpoint import load_model


def test_a_locked_tower_from_exported_weights(
    tmp_path, tiny_config, make_samples, write_dataset, make_config, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", make_samples(60))
    torch.manual_seed(7)
    start = CLIP(tiny_config)
    write_weights(tmp_path / "start", Weights(tiny_config, start.state_dict(), ""), "huggingface", "start")
    changes = {
        "epochs": 2,
        "weights": "start",
        "lock": "image",
        "optimizer": {"layer_decay": 0.5},
        "evaluation": {"tasks": {"captions": {"kind": "retrieval", "path": str(tmp_path / "data")}}},
        "cluster": {"num_workers": 2},
    }
    config = TrainConfig.model_validate(make_config("tuned", tmp_path / "data", **changes))
    summary = train_job.main(config)
    assert summary["retrieval"]["captions"]["num_texts"] == 60

    tuned = load_model(summary["checkpoint"]).state_dict()
    for name, tensor in start.state_dict().items():
        locked = name.startswith("visual.")
        assert torch.equal(tuned[name], tensor) == locked or name == "logit_scale", name
    convert.main(ConvertConfig(input=summary["checkpoint"], output="exported", format="open_clip"))
    exported = load_model("exported").state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in tuned.items())
    embedded = embed.main(EmbedConfig(model="exported", data=str(tmp_path / "data"), output="embeddings"))
    assert (embedded["pictures"], embedded["texts"]) == (60, 60)
    assert embedded["model_version"].startswith("exported@")


def test_weights_that_do_not_fit_are_said_before_anything_starts(
    tmp_path, tiny_config, make_samples, write_dataset, make_config, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", make_samples(60))
    other = tiny_config.model_copy(update={"embed_dim": 8})
    write_weights(tmp_path / "start", Weights(other, CLIP(other).state_dict(), ""), "rayclip", "start")
    config = make_config("tuned", tmp_path / "data", epochs=1, weights=str(tmp_path / "start"))
    with pytest.raises(UserError, match=r"start': the weights are of another model: their embed_dim is 8, not 16$"):
        train_job.main(TrainConfig.model_validate(config))
    config["weights"] = "nowhere"
    with pytest.raises(UserError, match=r"no model at '.*nowhere'"):
        train_job.main(TrainConfig.model_validate(config))
    assert not (tmp_path / "runs").exists()
