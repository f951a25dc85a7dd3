"""InfoNCE against its formula, and two processes' gradients against those of one with the whole batch."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from rayclip.collective import all_gather_rows, gather_counts, reduce_counts
from rayclip.config import ModelConfig, TextConfig, VisionConfig
from rayclip.models.clip import CLIP
from rayclip.training.loss import info_nce

pytestmark = pytest.mark.usefixtures("one_thread")


def reference_loss(image, text, scale):
    """The formula in the paper's figure 3, number by number."""
    scores = scale * image @ text.T
    total = 0.0
    for matrix in (scores, scores.T):
        for i, row in enumerate(matrix):
            total += math.log(sum(math.exp(s - row.max()) for s in row)) + row.max() - row[i]
    return total / (2 * len(scores))


def features(num, dim=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (F.normalize(torch.randn(num, dim, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))


@pytest.mark.parametrize("num", [1, 2, 9, 40])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_the_loss_is_its_formula(num, scale):
    image, text = features(num)
    expected = reference_loss(image.numpy(), text.numpy(), scale)
    in_float64 = info_nce(image, text, torch.tensor(scale, dtype=torch.float64), [num]).item()
    assert in_float64 == pytest.approx(expected, abs=1e-12)
    in_float32 = info_nce(image.float(), text.float(), torch.tensor(scale), [num]).item()
    assert in_float32 == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_model_that_knows_nothing_has_the_loss_of_guessing():
    same = torch.ones(8, 4) / 2
    assert info_nce(same, same, torch.tensor(10.0), [8]).item() == pytest.approx(math.log(8))


def test_the_gradient_is_that_of_the_formula():
    image, text = features(5)
    scale = torch.tensor(3.0, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (image, text, scale)]
    assert torch.autograd.gradcheck(lambda i, t, s: info_nce(i, t, s, [5]), inputs)
    info_nce(*inputs, [5]).backward()
    by_hand = []
    for step in (1e-6, -1e-6):
        by_hand.append(reference_loss(image.detach().numpy(), text.detach().numpy(), 3.0 + step))
    assert scale.grad.item() == pytest.approx((by_hand[0] - by_hand[1]) / 2e-6, rel=1e-5)


# Two processes

BATCH_SIZES = ((5, 3), (1, 7), (6, 0), (0, 4))


def small_model():
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=24,
        vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2),
        text=TextConfig(context_length=12, vocab_size=60, width=32, layers=2, heads=2),
    )
    return CLIP(config)


def small_batch(num):
    generator = torch.Generator().manual_seed(num)
    image = torch.randint(0, 256, (num, 16, 16, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 60, (num, 12), dtype=torch.int32, generator=generator)
    return image, tokens, torch.randint(3, 13, (num,), dtype=torch.int32, generator=generator)


def dense_gradients(model):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.to_dense() if g.is_sparse else g for name, g in gradients.items()}


def run_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        results = []
        for sizes in BATCH_SIZES:
            model = small_model()
            model.token_embedding.sparse = True
            net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            loss = info_nce(*net(*(tensor[mine] for tensor in small_batch(sum(sizes)))), list(sizes))
            (loss * 2).backward()
            assert model.token_embedding.weight.grad.is_sparse
            results.append({"loss": reduce_counts(loss), "gradients": dense_gradients(model)})
        cpu = torch.device("cpu")
        rows = np.arange(6).reshape(3, 2)[: 3 * rank] + 10
        results.append({"rows": all_gather_rows(torch.from_numpy(rows)), "counts": gather_counts([rank, 7], cpu)})
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two gloo processes got."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(run_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(BATCH_SIZES)), ids=map(str, BATCH_SIZES))
def test_two_processes_have_the_gradient_of_the_whole_batch(workers, case):
    model = small_model()
    image, text, scale = model(*small_batch(sum(BATCH_SIZES[case])))
    scores = scale * image @ text.T
    target = torch.arange(len(scores))
    loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    loss.backward()
    expected = dense_gradients(model)
    assert expected["logit_scale"].abs() > 1e-3
    for got in workers:
        assert got[case]["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        assert got[case]["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            error = (got[case]["gradients"][name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, name


def test_rows_and_counts_of_all_ranks_are_gathered_by_rank(workers):
    for got in workers:
        assert got[-1]["rows"].tolist() == [[10, 11], [12, 13], [14, 15]]
        assert got[-1]["counts"] == [[0, 7], [1, 7]]


def test_one_process_gathers_from_itself():
    cpu = torch.device("cpu")
    rows = np.arange(4).reshape(2, 2)
    assert all_gather_rows(rows) is rows
    assert gather_counts([3, 4], cpu) == [[3, 4]]
    assert reduce_counts(torch.tensor(2.5)).item() == 2.5
