"""Both losses against their formulas in float64, in tiles of all sizes, alone and over several processes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rayclip.config import LossConfig
from rayclip.distributed import all_gather_rows, gather_counts, reduce_counts
from rayclip.training.loss import contrastive_loss, info_nce, sigmoid_loss

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("info_nce", "sigmoid")


def info_nce_formula(image, text, scale):
    """The formula in CLIP's figure 3, number by number."""
    scores = scale * image @ text.T
    total = 0.0
    for matrix in (scores, scores.T):
        for i, row in enumerate(matrix):
            total += math.log(sum(math.exp(s - row.max()) for s in row)) + row.max() - row[i]
    return total / (2 * len(scores))


def sigmoid_formula(image, text, scale, bias):
    """SigLIP's algorithm 1, number by number."""
    total = 0.0
    for i, row in enumerate(scale * image @ text.T + bias):
        for j, score in enumerate(row):
            total -= math.log(1 / (1 + math.exp(-score if i == j else score)))
    return total / len(image)


FORMULAS = {"info_nce": info_nce_formula, "sigmoid": sigmoid_formula}


def whole_matrix_loss(kind, image, text, scale, *bias):
    """The losses as one writes them down, for their gradients by autograd."""
    scores = scale * image @ text.T
    if kind == "info_nce":
        target = torch.arange(len(scores))
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    signs = 2 * torch.eye(len(scores), dtype=scores.dtype) - 1
    return -F.logsigmoid(signs * (scores + bias[0])).sum() / len(scores)


def outputs(num, kind, dim=7, scale=14.3, dtype=torch.float64):
    """What a model gives: features, half of them near their partners, the scale and, for sigmoid, the bias."""
    generator = torch.Generator().manual_seed(num)
    image, text = torch.randn(2, num, dim, generator=generator, dtype=torch.float64)
    text[::2] = image[::2] + 0.2 * text[::2]
    tensors = [F.normalize(image, dim=-1), F.normalize(text, dim=-1), torch.tensor(scale, dtype=torch.float64)]
    bias = [torch.tensor(-3.0, dtype=torch.float64)] if kind == "sigmoid" else []
    return [tensor.to(dtype).requires_grad_() for tensor in tensors + bias]


def value_and_gradients(loss, inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close(actual, expected, tolerance):
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        assert (got.double() - wanted).norm() <= tolerance * max(wanted.norm(), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [1, 2, 9, 40])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_the_loss_is_its_formula(kind, num, scale):
    inputs = outputs(num, kind, scale=scale)
    expected = FORMULAS[kind](*(tensor.detach().numpy() for tensor in inputs))
    config = LossConfig(kind=kind)
    assert contrastive_loss(inputs, [num], config).item() == pytest.approx(expected, abs=1e-12)
    in_float32 = contrastive_loss([tensor.float() for tensor in inputs], [num], config).item()
    assert in_float32 == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num", "tile_size"), [(1, 1), (6, 1), (9, 4), (9, 3), (9, 9), (9, 1024), (40, 7)])
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_gradients_in_tiles_are_those_of_the_whole_matrix(kind, num, tile_size, scale):
    inputs = outputs(num, kind, scale=scale)
    expected = value_and_gradients(whole_matrix_loss(kind, *inputs), inputs)
    loss = 2.5 * contrastive_loss(inputs, [num], LossConfig(kind=kind, tile_size=tile_size))
    assert_close(value_and_gradients(loss, inputs), [2.5 * tensor for tensor in expected], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_small_steps(kind):
    config = LossConfig(kind=kind, tile_size=2)
    assert torch.autograd.gradcheck(lambda *inputs: contrastive_loss(inputs, [5], config), outputs(5, kind, scale=3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_half_precision_are_added_up_in_full(kind):
    """Also where autocast is on: what is lost is lost before the loss, and in its gradient's last rounding."""
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in outputs(200, kind, dim=32)[:2]]
    rest = [tensor.detach().float().requires_grad_() for tensor in outputs(200, kind)[2:]]
    exact = [tensor.detach().double().requires_grad_() for tensor in halves + rest]
    expected = value_and_gradients(whole_matrix_loss(kind, *exact), exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss([*halves, *rest], [200], LossConfig(kind=kind, tile_size=64))
        actual = value_and_gradients(loss, [*halves, *rest])
    assert [tensor.dtype for tensor in actual[:3]] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert_close([actual[0], *actual[3:]], [expected[0], *expected[3:]], 1e-5)
    assert_close(actual[1:3], expected[1:3], 4e-3)


def test_a_model_that_knows_nothing_has_the_loss_of_guessing():
    same = torch.ones(8, 4) / 2
    assert info_nce(same, same, torch.tensor(10.0), [8]).item() == pytest.approx(math.log(8))
    loss = sigmoid_loss(same, same, torch.tensor(0.0), torch.tensor(0.0), [8])
    assert loss.item() == pytest.approx(8 * math.log(2))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.elements = max(self.elements, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_of_scores_is_never_whole(kind):
    inputs = outputs(96, kind, dim=4)
    with Largest() as largest:
        contrastive_loss(inputs, [96], LossConfig(kind=kind, tile_size=8)).backward()
    assert largest.elements == 96 * 4
    with Largest() as largest:
        whole_matrix_loss(kind, *inputs).backward()
    assert largest.elements == 96 * 96


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_both_losses_equal_open_clip(open_clip, kind):
    inputs = outputs(30, kind)
    theirs = (open_clip.loss.ClipLoss if kind == "info_nce" else open_clip.loss.SigLipLoss)()
    expected = value_and_gradients(theirs(*inputs), inputs)
    actual = value_and_gradients(contrastive_loss(inputs, [30], LossConfig(kind=kind, tile_size=8)), inputs)
    assert_close(actual, expected, 1e-12)


# Several processes

BATCH_SIZES = {
    2: [(5, 3), (1, 7), (6, 0), (0, 4)],
    4: [(4, 4, 4, 4), (3, 0, 5, 1), (0, 0, 2, 0), (1, 6, 0, 2)],
}
CASES = [(kind, distribution) for kind in KINDS for distribution in ("gather", "ring")]


def run_worker(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        results = {}
        for kind, distribution in CASES:
            for sizes in BATCH_SIZES[world_size]:
                image, text, *others = outputs(sum(sizes), kind)
                mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
                inputs = [*(tensor[mine].detach().requires_grad_() for tensor in (image, text)), *others]
                config = LossConfig(kind=kind, distribution=distribution, tile_size=3)
                loss = contrastive_loss(inputs, list(sizes), config)
                results[kind, distribution, sizes] = value_and_gradients(2.5 * loss, inputs)
        rows = np.arange(6).reshape(3, 2)[: 3 * (rank == 1)] + 10
        gathered = all_gather_rows(torch.from_numpy(rows)), gather_counts([rank, 7], torch.device("cpu"))
        torch.save((results, gathered), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def workers(request, tmp_path_factory):
    """What each of several gloo processes got."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(run_worker, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize(("kind", "distribution"), CASES)
def test_processes_have_the_loss_and_gradients_of_one(workers, kind, distribution):
    for sizes in BATCH_SIZES[len(workers)]:
        inputs = outputs(sum(sizes), kind)
        expected = value_and_gradients(2.5 * whole_matrix_loss(kind, *inputs), inputs)
        shares = [results[kind, distribution, sizes] for results, _ in workers]
        loss, image, text, *others = zip(*shares, strict=True)
        actual = [sum(loss), torch.cat(image), torch.cat(text), *map(sum, others)]
        assert_close(actual, expected, 1e-12)


def test_rows_and_counts_of_all_ranks_are_gathered_by_rank(workers):
    for _, (rows, counts) in workers:
        assert rows.tolist() == [[10, 11], [12, 13], [14, 15]]
        assert counts == [[rank, 7] for rank in range(len(workers))]


def test_one_process_gathers_from_itself():
    cpu = torch.device("cpu")
    rows = np.arange(4).reshape(2, 2)
    assert all_gather_rows(rows) is rows
    assert gather_counts([3, 4], cpu) == [[3, 4]]
    assert reduce_counts(torch.tensor(2.5)).item() == 2.5
