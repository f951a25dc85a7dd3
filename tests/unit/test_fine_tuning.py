"""Patch dropout, locked towers, ResNets in training, and layer-wise rates."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayclip.config import ModelConfig, OptimizerConfig, ResNetConfig, TextConfig, VisionConfig
from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import RunState, load_model, restore, write_checkpoint
from rayclip.training.loop import _data_parallel
from rayclip.training.optimizer import build_optimizer, layer_rates
from rayclip.training.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = TextConfig(context_length=12, vocab_size=60, width=32, layers=2, heads=2)
RESNET = ModelConfig(embed_dim=24, vision=ResNetConfig(image_size=64, width=8, layers=(1, 1, 1, 1)), text=TEXT)


def vit(patch_dropout=0.0):
    vision = VisionConfig(image_size=64, patch_size=8, width=32, layers=3, heads=2, patch_dropout=patch_dropout)
    return ModelConfig(embed_dim=24, vision=vision, text=TEXT)


def new(config, seed=0):
    torch.manual_seed(seed)
    return CLIP(config)


def make_batch(count=4, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 13, count).astype(np.int32)
    tokens = generator.integers(1, 60, (count, 12)).astype(np.int32)
    return {
        "image": generator.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8),
        "tokens": np.where(np.arange(12) < lengths[:, None], tokens, 0).astype(np.int32),
        "num_tokens": lengths,
        "position": np.zeros(count, dtype=np.int64),
        "row": np.arange(count, dtype=np.int32),
        "cause": np.zeros(count, dtype=np.int8),
    }


def state_of(model):
    return copy.deepcopy(model.state_dict())


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


# Patch dropout


def test_without_it_and_in_evaluation_nothing_changes():
    image = torch.from_numpy(make_batch()["image"])
    plain, dropping = new(vit()), new(vit(0.5))
    expected = plain.eval().encode_image(image)
    assert torch.equal(plain.train().encode_image(image), expected)
    assert torch.equal(dropping.eval().encode_image(image), expected)
    assert not torch.allclose(dropping.train().encode_image(image), expected)


def test_every_patch_is_kept_equally_often_and_pictures_draw_their_own():
    tower = new(vit(0.75)).visual
    torch.manual_seed(3)
    kept = tower._draw(2000, 64)
    assert kept.shape == (2000, 16)
    assert (kept.diff(dim=1) > 0).all(), "none twice"
    counts = torch.bincount(kept.flatten(), minlength=64)
    # Binomial(2000, 1/4) has a deviation of 19.4.
    assert (counts - 500).abs().max() < 5 * 19.4
    assert len({tuple(row) for row in kept.tolist()}) == 2000
    pairs = Counter((0 in row, 1 in row) for row in map(set, kept.tolist()))
    assert pairs[True, True] / 2000 == pytest.approx(16 * 15 / (64 * 63), abs=0.02)


def test_what_is_kept_is_computed_as_if_it_were_the_picture(monkeypatch):
    """Against a tower of every patch whose attention may not look at those left out."""
    tower = new(vit(0.5)).visual.train()
    image = torch.from_numpy(make_batch()["image"])
    torch.manual_seed(5)
    kept = tower._draw(4, 64)
    torch.manual_seed(5)
    actual = tower(image)
    pixels = tower._patches(image) @ tower.conv1.weight.flatten(1).T
    for row in range(4):
        tokens = torch.cat([tower.class_embedding[None], pixels[row]]) + tower.positional_embedding
        tokens = tower.ln_pre(tokens[[0, *(1 + kept[row]).tolist()]])
        for block in tower.transformer.resblocks:
            tokens = block(tokens, [(1, len(tokens))], causal=False)
        expected = tower.ln_post(tokens[0]) @ tower.proj
        torch.testing.assert_close(actual[row], expected, atol=1e-5, rtol=0)


def test_it_draws_from_the_generator_that_checkpoints_save(tmp_path):
    def start():
        model = new(vit(0.5))
        return model, build_optimizer(model, OptimizerConfig(lr=1e-2))

    model, optimizer = start()
    train_step(model, model, optimizer, make_batch(), 1e-2, None)
    write_checkpoint(tmp_path / "one", model, optimizer, RunState(), {}, {})
    results = []
    for _ in range(2):
        model, optimizer = start()
        restore(tmp_path / "one", model, optimizer)
        train_step(model, model, optimizer, make_batch(), 1e-2, None)
        results.append(state_of(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ResNets in training


def test_an_empty_batch_gives_a_resnet_zero_gradients_and_no_statistics():
    model = new(RESNET).train()
    before = state_of(model)
    image = model.encode_image(torch.zeros(0, 64, 64, 3, dtype=torch.uint8))
    assert image.shape == (0, 24)
    image.sum().backward()
    for name, parameter in model.visual.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert not changed(before, model)


def test_a_resnets_checkpoint_holds_its_statistics(tmp_path):
    model = new(RESNET).train()
    optimizer = build_optimizer(model, OptimizerConfig())
    train_step(model, model, optimizer, make_batch(), 1e-2, None)
    write_checkpoint(tmp_path / "one", model, optimizer, RunState(), {"model": RESNET.model_dump(mode="json")}, {})
    loaded = load_model(tmp_path / "one")
    assert not changed(state_of(model), loaded)
    assert loaded.visual.bn1.num_batches_tracked == 1


def test_an_image_tower_without_a_kind_is_a_vit():
    old = vit().model_dump(mode="json")
    del old["vision"]["kind"], old["vision"]["mlp_ratio"], old["vision"]["patch_dropout"]
    assert ModelConfig.model_validate(old) == vit()
    assert ModelConfig.model_validate(RESNET.model_dump(mode="json")) == RESNET


# Locked towers


@pytest.mark.parametrize("config", [vit(0.5), RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_stays_as_it_is(tmp_path, config, tower):
    def start():
        model = new(config).train()
        model.lock(tower)
        return model, build_optimizer(model, OptimizerConfig(lr=1e-2))

    model, optimizer = start()
    before = state_of(model)
    for seed in range(2):
        train_step(model.train(), model, optimizer, make_batch(seed=seed), 1e-2, 1.0)
    moved = changed(before, model)
    of_image = {name for name in before if name.startswith("visual.")}
    assert moved & of_image == (set() if tower == "image" else moved - set(before).difference(of_image))
    assert bool(moved & of_image) == (tower == "text")
    assert ("transformer.resblocks.0.attn.in_proj_weight" in moved) == (tower == "image")
    assert "logit_scale" in moved

    batch = {name: torch.from_numpy(array) for name, array in make_batch().items()}
    image, text, _ = model(batch["image"], batch["tokens"], batch["num_tokens"])
    assert (image.requires_grad, text.requires_grad) == (tower != "image", tower != "text")

    write_checkpoint(tmp_path / "one", model, optimizer, RunState(), {}, {})
    other, other_optimizer = start()
    restore(tmp_path / "one", other, other_optimizer)
    for pair in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(7)
        train_step(pair[0], *pair, make_batch(seed=5), 1e-2, 1.0)
    assert not changed(state_of(model), other)


def run_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        results = []
        for config, tower in ((vit(), "image"), (vit(), "text"), (RESNET, "image"), (RESNET, "text")):
            model = new(config).train()
            model.lock(tower)
            optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0, eps=1e-4))
            net = _data_parallel(model)
            whole = make_batch()
            for sizes in ((2, 2), (4, 0)):
                mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
                part = {name: array[mine] for name, array in whole.items()}
                train_step(net, model, optimizer, part, 1e-3, None)
            results.append(state_of(model))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_train_the_other_tower_as_one_does(tmp_path):
    mp.spawn(run_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case, (config, tower) in enumerate(
        ((vit(), "image"), (vit(), "text"), (RESNET, "image"), (RESNET, "text")),
    ):
        parameters = [name for name, _ in CLIP(config).named_parameters()]
        assert all(torch.equal(first[case][name], second[case][name]) for name in parameters), (case, tower)
        if tower == "text" and config is RESNET:
            continue  # each rank normalises by its own pictures
        model = new(config).train()
        model.lock(tower)
        optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0, eps=1e-4))
        for _ in range(2):
            train_step(model, model, optimizer, make_batch(), 1e-3, None)
        for name in parameters:
            torch.testing.assert_close(first[case][name], model.state_dict()[name], atol=2e-5, rtol=0, msg=name)


# Layer-wise rates


@pytest.mark.parametrize("config", [vit(), RESNET], ids=["vit", "resnet"])
def test_rates_fall_from_the_head_to_the_embeddings(config):
    rates = layer_rates(CLIP(config), 0.5)
    expected = {
        "logit_scale": 1, "text_projection": 1, "ln_final.weight": 1, "positional_embedding": 1 / 8,
        "token_embedding.weight": 1 / 8, "transformer.resblocks.1.ln_1.bias": 1 / 2,
        "transformer.resblocks.0.mlp.c_fc.weight": 1 / 4,
    }  # fmt: skip
    if config is RESNET:
        expected |= {
            "visual.conv1.weight": 1 / 32, "visual.bn3.bias": 1 / 32, "visual.layer1.0.conv1.weight": 1 / 16,
            "visual.layer4.0.bn3.bias": 1 / 2, "visual.attnpool.positional_embedding": 1,
        }  # fmt: skip
    else:
        expected |= {
            "visual.conv1.weight": 1 / 16, "visual.class_embedding": 1 / 16, "visual.positional_embedding": 1 / 16,
            "visual.ln_pre.weight": 1 / 16, "visual.transformer.resblocks.0.ln_2.bias": 1 / 8,
            "visual.transformer.resblocks.2.attn.in_proj_weight": 1 / 2, "visual.ln_post.bias": 1, "visual.proj": 1,
        }  # fmt: skip
    assert {name: rates[name] for name in expected} == expected
    assert set(layer_rates(CLIP(config), 1.0).values()) == {1.0}


def test_rates_reach_the_step():
    """Adam's first step is as long as the rate, whatever the gradient."""
    model = new(vit())
    before = state_of(model)
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.5, weight_decay=0.0, eps=1e-12))
    train_step(model, model, optimizer, make_batch(), 1e-3, None)
    rates = layer_rates(model, 0.5)
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        assert moved.max().item() == pytest.approx(1e-3 * rates[name], rel=2e-2), name
    assert len(optimizer.param_groups) == 2 * len(set(rates.values()))
