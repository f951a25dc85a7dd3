"""RowAdamW against torch's AdamW with dense gradients, what is decayed, and the clipping of sparse gradients."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from rayclip.config import OptimizerConfig
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.training.optimizer import RowAdamW, build_optimizer
from rayclip.training.schedule import learning_rate
from rayclip.training.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"lr": 0.05, "betas": (0.9, 0.98), "eps": 1e-6}


def two_tables(weight_decay, rows=12):
    """The same table twice: one gives sparse gradients to RowAdamW, one dense gradients to AdamW."""
    torch.manual_seed(0)
    sparse = nn.Embedding(rows, 5, sparse=True)
    dense = copy.deepcopy(sparse)
    dense.sparse = False
    return (
        (sparse, RowAdamW(sparse.parameters(), weight_decay=weight_decay, fused=True, **SETTINGS)),
        (dense, torch.optim.AdamW(dense.parameters(), weight_decay=weight_decay, **SETTINGS)),
    )


def train(tables, batches):
    target = torch.linspace(-1, 1, 5)
    for ids in batches:
        for table, optimizer in tables:
            optimizer.zero_grad()
            (table(torch.tensor(ids)) - target).pow(2).sum().backward()
            optimizer.step()
    return [table.weight.detach() for table, _ in tables]


BATCHES = ([1, 3, 3, 8], [3], [0, 1], [8, 8, 8], [11, 0], [5])


def test_sparse_steps_are_dense_steps_without_decay():
    sparse, dense = train(two_tables(0.0), BATCHES)
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-7)


def test_sparse_steps_are_dense_steps_for_rows_in_use_from_the_start():
    used = [0, 1, 3, 5, 8, 11]
    tables = two_tables(0.2)
    before = tables[0][0].weight.detach().clone()
    sparse, dense = train(tables, [used, *BATCHES])
    torch.testing.assert_close(sparse[used], dense[used], rtol=1e-6, atol=1e-7)
    untouched = [row for row in range(12) if row not in used]
    assert torch.equal(sparse[untouched], before[untouched])
    assert not torch.allclose(dense[untouched], before[untouched])


def test_a_row_moves_on_in_steps_that_do_not_touch_it():
    tables = two_tables(0.0)
    first, _ = train(tables, [[4]])
    first = first.clone()
    second, _ = train(tables, [[5]])
    assert not torch.equal(first[4], second[4])


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return CLIP(tiny_config)


def test_gains_biases_class_token_and_scale_are_not_decayed(model):
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert len(names) == len(decay)
    for name in ("logit_scale", "visual.class_embedding", "ln_final.weight", "visual.ln_pre.weight"):
        assert names.pop(name) == 0
    for name, value in names.items():
        matrix = not name.endswith("bias") and ".ln_" not in name and not name.startswith("ln_")
        assert value == (0.3 if matrix else 0), name


def test_settings_reach_every_group(model):
    config = OptimizerConfig(lr=0.123, betas=(0.8, 0.9), eps=1e-3)
    for group in build_optimizer(model, config).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.123, (0.8, 0.9), 1e-3)


def test_frozen_weights_are_left_out(model):
    model.visual.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for name, p in model.named_parameters() if not name.startswith("visual.")}


# Steps


def make_batch(lengths, size=16, seed=0):
    """A batch of samples with captions of these lengths; 0 stands for an unreadable one."""
    generator = np.random.default_rng(seed)
    lengths = np.array(lengths, dtype=np.int32)
    # Few different tokens: a row of the embedding gets several gradients, which have to be summed.
    tokens = generator.integers(1, 12, (len(lengths), 16), dtype=np.int32)
    tokens[np.arange(16) >= lengths[:, None]] = 0
    return {
        "image": generator.integers(0, 256, (len(lengths), size, size, 3), dtype=np.uint8)
        * (lengths > 0)[:, None, None, None].astype(np.uint8),
        "tokens": tokens,
        "num_tokens": lengths,
        "position": np.arange(len(lengths), dtype=np.int64) // 3 + 40,
        "row": np.arange(len(lengths), dtype=np.int32) % 3,
        "cause": (lengths == 0).astype(np.int8) * 4,
    }


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


@pytest.mark.parametrize("share", [0.3, 3.0])
def test_sparse_gradients_are_clipped_as_dense_ones(model, share):
    """SGD moves the weights by the clipped gradient itself, so the moves show its norm."""
    dense = copy.deepcopy(model)
    model.token_embedding.sparse = True
    batch = make_batch([5, 9, 4, 16, 2])
    images, tokens, lengths = (torch.from_numpy(batch[name]) for name in ("image", "tokens", "num_tokens"))
    image, text, scale = dense(images, tokens, lengths)
    scores = scale * image @ text.T
    target = torch.arange(5)
    (nn.functional.cross_entropy(scores, target) / 2 + nn.functional.cross_entropy(scores.T, target) / 2).backward()
    norm = torch.cat([p.grad.flatten() for p in dense.parameters()]).norm().item()
    nn.utils.clip_grad_norm_(dense.parameters(), share * norm)

    before = weights_of(model)
    train_step(model, model, torch.optim.SGD(model.parameters()), batch, 1.0, share * norm)
    moved = {name: before[name] - after for name, after in weights_of(model).items()}
    assert_same(moved, {name: p.grad for name, p in dense.named_parameters()}, rtol=1e-4, atol=2e-6)
    total = torch.cat([m.flatten() for m in moved.values()]).norm().item()
    assert total == pytest.approx(min(share, 1.0) * norm, rel=1e-3)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_row_sparse_training_is_dense_training(model, max_grad_norm):
    """Several whole steps with clipping: RowAdamW on sparse gradients, AdamW on dense ones."""
    dense = copy.deepcopy(model)
    config = OptimizerConfig(weight_decay=0.0, eps=1e-4)
    rows = build_optimizer(model, config)
    whole = torch.optim.AdamW(dense.parameters(), betas=config.betas, eps=config.eps, weight_decay=0.0)
    for seed in range(3):
        batch = make_batch([5, 9, 4, 16, 2], seed=seed)
        results = [
            train_step(m, m, optimizer, batch, 1e-3, max_grad_norm) for m, optimizer in ((model, rows), (dense, whole))
        ]
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert dense.token_embedding.weight.grad is not None
    assert_same(weights_of(model), weights_of(dense), rtol=1e-3, atol=2e-5)


def test_a_step_says_what_it_did(model):
    optimizer = build_optimizer(model, OptimizerConfig())
    scale = model.logit_scale.exp().item()
    result = train_step(model, model, optimizer, make_batch([5, 0, 7, 0, 3]), 0.5e-3, None)
    assert (result.num_trained, result.num_skipped) == (3, 2)
    assert result.logit_scale == pytest.approx(scale)
    assert all(group["lr"] == 0.5e-3 for group in optimizer.param_groups)
    assert model.logit_scale.exp().item() != pytest.approx(scale, rel=1e-6)


def test_unreadable_samples_and_padding_change_nothing(model):
    other = copy.deepcopy(model)
    batch = make_batch([5, 9, 4])
    wide = make_batch([5, 0, 9, 0, 4, 0])
    for name in ("image", "tokens"):
        wide[name][[0, 2, 4]] = batch[name]
    wide["position"][5] = -1
    result = train_step(model, model, build_optimizer(model, OptimizerConfig()), batch, 1e-3, None)
    padded = train_step(other, other, build_optimizer(other, OptimizerConfig()), wide, 1e-3, None)
    assert padded.loss == result.loss
    assert (result.num_skipped, padded.num_skipped) == (0, 2)
    assert_same(weights_of(model), weights_of(other))


@pytest.mark.parametrize("position", [7, -1])
def test_a_batch_without_a_readable_sample_trains_nothing(model, position):
    before, optimizer = weights_of(model), build_optimizer(model, OptimizerConfig(weight_decay=1.0))
    train_step(model, model, optimizer, make_batch([5, 4]), 1e-3, None)
    before = weights_of(model)
    batch = make_batch([0, 0, 0])
    batch["position"][:] = position
    result = train_step(model, model, optimizer, batch, 1e-3, None)
    assert (result.num_trained, result.num_skipped) == (0, 3 if position >= 0 else 0)
    assert np.isnan(result.loss)
    assert_same(before, weights_of(model))


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_no_weight(model):
    optimizer = build_optimizer(model, OptimizerConfig())
    with torch.no_grad():
        model.visual.proj[0, 0] = torch.nan
    before = weights_of(model)
    with pytest.raises(UserError, match=r"the loss is nan: the batch holds 4 samples of stream positions 40, 41$"):
        train_step(model, model, optimizer, make_batch([5, 9, 4, 16, 0, 0, 0]), 1e-3, 1.0)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight.nan_to_num(7), before[name].nan_to_num(7)), name


@pytest.mark.parametrize(("start", "lr", "sign"), [(np.log(100), 10.0, 1), (0.0, 10.0, -1)])
def test_the_logit_scale_stays_between_1_and_100(model, start, lr, sign):
    with torch.no_grad():
        model.logit_scale.fill_(start)
    before = model.logit_scale.item()

    class Push(torch.optim.SGD):
        def step(self):
            with torch.no_grad():
                model.logit_scale += sign * lr

    train_step(model, model, Push(model.parameters(), lr=1e-9), make_batch([5, 9]), 1e-9, None)
    assert model.logit_scale.item() == pytest.approx(before)
    assert 0 <= model.logit_scale.item() <= np.log(100) + 1e-6


# Learning rates


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    settings = OptimizerConfig(lr=2.0, warmup_samples=100)

    def rate(seen):
        return learning_rate(seen, settings, 1100)

    assert [rate(seen) for seen in (0, 49, 99)] == pytest.approx([0.02, 1.0, 2.0])
    assert [rate(seen) for seen in (100, 350, 600, 850, 1100)] == pytest.approx(
        [2.0, 1 + np.sqrt(0.5), 1.0, 1 - np.sqrt(0.5), 0.0]
    )
    rates = [rate(seen) for seen in range(1101)]
    assert max(rates) == 2.0
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_rates_at_the_limits():
    at_once, slowly = (OptimizerConfig(lr=1.0, warmup_samples=samples) for samples in (0, 10))
    assert learning_rate(0, at_once, 10) == 1.0
    assert learning_rate(10_000, at_once, 10) == pytest.approx(0)
    assert learning_rate(5, slowly, 10) == pytest.approx(0.6)
    assert learning_rate(10, slowly, 10) == 1.0


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("sqrt", 1 - np.sqrt(0.5))])
def test_the_rate_stays_until_its_cooldown_and_then_falls_to_zero(shape, halfway):
    settings = OptimizerConfig(lr=2.0, warmup_samples=100, schedule="wsd", cooldown_samples=200, cooldown_shape=shape)
    rates = [learning_rate(seen, settings, 1000) for seen in range(1001)]
    assert rates[:100] == [2.0 * (seen + 1) / 100 for seen in range(100)]
    assert set(rates[100:801]) == {2.0}
    assert rates[900] == pytest.approx(2.0 * halfway)
    assert rates[800:] == sorted(rates[800:], reverse=True)
    assert rates[1000] == 0 and learning_rate(1100, settings, 1000) == 0


def test_a_trunk_never_cools_down_and_the_warm_up_is_the_same_for_all():
    trunk = OptimizerConfig(lr=1.0, warmup_samples=10, schedule="wsd")
    assert {learning_rate(seen, trunk, 50) for seen in range(10, 70)} == {1.0}
    cosine = OptimizerConfig(lr=1.0, warmup_samples=10)
    assert [learning_rate(seen, trunk, 50) for seen in range(10)] == [
        learning_rate(seen, cosine, 50) for seen in range(10)
    ]


def test_a_cooldown_of_a_cosine_is_refused():
    with pytest.raises(ValueError, match="cooldown_samples is for schedule=wsd, not schedule=cosine; leave it out"):
        OptimizerConfig(cooldown_samples=10)
