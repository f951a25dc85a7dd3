"""Gradients of the whole batch: over processes, in micro-batches, and with activations that are computed anew."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rayclip.config import LossConfig, ModelConfig, TextConfig, VisionConfig
from rayclip.distributed import reduce_counts
from rayclip.models import transformer
from rayclip.models.clip import CLIP
from rayclip.models.presets import with_logit_bias
from rayclip.models.transformer import checkpoint_activations
from rayclip.training.gradient import forward_backward
from rayclip.training.loss import contrastive_loss

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
INFO_NCE, SIGMOID = LossConfig(), LossConfig(kind="sigmoid")


def small_model(loss=INFO_NCE, layers=2):
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=24,
        vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=layers, heads=2),
        text=TextConfig(context_length=12, vocab_size=60, width=32, layers=layers, heads=2),
    )
    model = CLIP(with_logit_bias(config) if loss.kind == "sigmoid" else config)
    model.token_embedding.sparse = True
    return model


def small_batch(num):
    generator = torch.Generator().manual_seed(num)
    image = torch.randint(0, 256, (num, 16, 16, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 60, (num, 12), dtype=torch.int32, generator=generator)
    return image, tokens, torch.randint(3, 13, (num,), dtype=torch.int32, generator=generator)


def gradients(model):
    """Of all parameters, dense."""
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: g.to_dense() if g.is_sparse else g.clone() for name, g in found.items()}


def plain_step(model, batch, loss):
    """One process, one graph, all pairs."""
    share = contrastive_loss(model(*batch), [len(batch[0])], loss)
    share.backward()
    return share.item(), gradients(model)


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (actual[name] - gradient).norm() <= tolerance * gradient.norm(), name


# Micro-batches


@pytest.mark.parametrize("loss", [INFO_NCE, SIGMOID], ids=["info_nce", "sigmoid"])
@pytest.mark.parametrize("size", [1, 4, 9, 10, 11])
def test_micro_batches_have_the_gradient_of_the_whole_batch(loss, size):
    model = small_model(loss)
    batch = small_batch(10)
    value, expected = plain_step(copy.deepcopy(model), batch, loss)
    share = forward_backward(model, batch, [10], CPU, loss, size)
    assert share.item() == pytest.approx(value, rel=1e-6)
    assert model.token_embedding.weight.grad.is_sparse
    assert_same(gradients(model), expected)


def test_a_thousand_pairs_in_micro_batches_of_64_have_the_gradient_of_the_whole_batch():
    model = small_model()
    batch = small_batch(1024)
    value, expected = plain_step(copy.deepcopy(model), batch, INFO_NCE)
    assert forward_backward(model, batch, [1024], CPU, INFO_NCE, 64).item() == pytest.approx(value, rel=1e-6)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("locked", ["visual", "transformer"])
def test_frozen_weights_get_no_gradient_and_disturb_no_other(locked):
    model = small_model()
    if locked == "transformer":
        model.requires_grad_(False)
        model.visual.requires_grad_(True)
        model.logit_scale.requires_grad_(True)
    else:
        model.visual.requires_grad_(False)
    batch = small_batch(10)
    twin = copy.deepcopy(model)
    contrastive_loss(twin(*batch), [10], INFO_NCE).backward()
    forward_backward(model, batch, [10], CPU, INFO_NCE, 4)
    for (name, p), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (wanted.grad is None) == (not p.requires_grad), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad.to_dense(), wanted.grad.to_dense(), rtol=1e-4, atol=1e-6, msg=name)


class Noisy(nn.Module):
    """A model whose pictures' features have random directions left out, and which keeps what it was asked and gave."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, image, tokens, num_tokens):
        features, *rest = self.model(image, tokens, num_tokens)
        features = features * (torch.rand_like(features) < 0.5)
        self.calls.append((len(image), torch.is_grad_enabled(), features.detach()))
        return features, *rest


def test_only_a_micro_batch_is_in_the_towers_and_its_random_draws_are_replayed():
    net = Noisy(small_model())
    torch.manual_seed(5)
    forward_backward(net, small_batch(10), [10], CPU, INFO_NCE, 4)
    after = torch.rand(1)
    first, second = net.calls[:3], net.calls[3:]
    assert [call[:2] for call in net.calls] == [(n, grad) for grad in (False, True) for n in (4, 4, 2)]
    for (_, _, once), (_, _, again) in zip(first, second, strict=True):
        assert torch.equal(once, again)
    assert not torch.equal(first[0][2] == 0, first[1][2] == 0)
    # The draws go on from where the first pass left them.
    torch.manual_seed(5)
    torch.rand(10, 24)
    assert torch.equal(torch.rand(1), after)


# Activations


@pytest.mark.parametrize("size", [None, 4])
def test_activations_that_are_computed_anew_change_no_gradient(size, monkeypatch):
    model = small_model(layers=3)
    batch = small_batch(10)
    twin = copy.deepcopy(model)
    forward_backward(twin, batch, [10], CPU, INFO_NCE, size)
    blocks = []
    run = transformer.Block.forward
    monkeypatch.setattr(transformer.Block, "forward", lambda *args: blocks.append(args[0]) or run(*args))
    checkpoint_activations(model)
    forward_backward(model, batch, [10], CPU, INFO_NCE, size)
    micro_batches = 1 if size is None else 3
    assert len(blocks) == 6 * micro_batches * (2 if size is None else 3)
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_nothing_is_computed_anew_where_nothing_is_learned():
    model = small_model()
    with torch.no_grad():
        expected = model(*small_batch(5))
        checkpoint_activations(model)
        for actual, wanted in zip(model(*small_batch(5)), expected, strict=True):
            assert torch.equal(actual, wanted)


# Two processes

BATCH_SIZES = ((5, 3), (1, 7), (6, 0), (0, 4))
CASES = {
    "gather": (LossConfig(), None, False),
    "ring": (LossConfig(distribution="ring"), None, False),
    "sigmoid": (LossConfig(kind="sigmoid", distribution="ring"), None, False),
    "micro": (LossConfig(), 2, False),
    "micro, ring, activations anew": (LossConfig(distribution="ring"), 2, True),
    "micro where more than 5, sigmoid": (LossConfig(kind="sigmoid"), 5, False),
}


def run_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        results = {}
        for name, (loss, size, anew) in CASES.items():
            model = small_model(loss)
            if anew:
                checkpoint_activations(model)
            net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            for sizes in BATCH_SIZES:  # one after another through one net: what a step leaves must not disturb the next
                model.zero_grad(set_to_none=True)
                mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
                inputs = tuple(tensor[mine] for tensor in small_batch(sum(sizes)))
                share = forward_backward(net, inputs, list(sizes), CPU, loss, size)
                assert model.token_embedding.weight.grad.is_sparse
                results[name, sizes] = {"loss": reduce_counts(share).item(), "gradients": gradients(model)}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two gloo processes got."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(run_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradient_of_the_whole_batch(workers, name):
    loss = CASES[name][0]
    for sizes in BATCH_SIZES:
        value, expected = plain_step(small_model(loss), small_batch(sum(sizes)), loss)
        for got in workers:
            assert got[name, sizes]["loss"] == pytest.approx(value, rel=1e-6)
            assert_same(got[name, sizes]["gradients"], expected)
