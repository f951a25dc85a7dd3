"""Forward and backward of the loss in tiles, beside the whole matrix and beside open_clip's: time, and memory.

Shapes: N pairs; D embed_dim.
"""

from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.config import BenchmarkConfig
from benchmarks.memory import extra_bytes
from benchmarks.peers import load_open_clip
from benchmarks.timing import paired_times
from rayclip.training.loss import info_nce

_EMBED_DIM = 512
_TIMED_PAIRS = 4_096
_MEASURED_PAIRS = 32_768
_WHOLE_MATRICES = 6  # more of them than the whole matrix's forward and backward hold at once

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Time at N = 4,096 and peak extra memory at N = 32,768, D = 512, float32.

    Extra memory is the peak of a fresh process over forward and backward beyond what it held with features in place;
    gradients of the features are in it. Where the whole matrix would not fit into half of the free memory, it is
    measured at the largest half, quarter, ... of N that does, and scaled by the square.
    """
    features = _features(_TIMED_PAIRS)

    def step(name: str) -> Callable[[], Tensor]:
        loss = _LOSSES[name]()
        return lambda: _forward_backward(loss, features)

    ours, naive, peer = (step(name) for name in _LOSSES)
    expected = naive().item()
    difference = max(abs(loss().item() - expected) for loss in (ours, peer)) / expected
    ours_s, naive_s, naive_ratio = paired_times(ours, naive, config.repeats)
    _, peer_s, peer_ratio = paired_times(ours, peer, config.repeats)
    fits = _fitting_pairs()
    ours_bytes, naive_bytes, peer_bytes = (
        extra_bytes(_prepare, name, pairs) * (_MEASURED_PAIRS // pairs) ** 2
        for name, pairs in (("ours", _MEASURED_PAIRS), ("naive", fits), ("open_clip", fits))
    )
    return {
        "pairs_timed": _TIMED_PAIRS,
        "seconds": round(ours_s, 4),
        "naive_seconds": round(naive_s, 4),
        "open_clip_seconds": round(peer_s, 4),
        "time_ratio": round(1 / naive_ratio, 3),
        "time_ratio_vs_open_clip": round(1 / peer_ratio, 3),
        "loss_relative_difference": difference,
        "pairs_measured": _MEASURED_PAIRS,
        "extra_memory_bytes": ours_bytes,
        "naive_extra_memory_bytes": naive_bytes,
        "open_clip_extra_memory_bytes": peer_bytes,
        "others_measured_at_pairs": fits,
        "extra_memory_ratio": round(ours_bytes / naive_bytes, 4),
        "extra_memory_ratio_vs_open_clip": round(ours_bytes / peer_bytes, 4),
    }


def _naive(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    scores_NN = logit_scale * image_ND @ text_ND.T
    target_N = torch.arange(len(image_ND), device=image_ND.device)
    return (F.cross_entropy(scores_NN, target_N) + F.cross_entropy(scores_NN.T, target_N)) / 2


def _ours(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    return info_nce(image_ND, text_ND, logit_scale, [len(image_ND)])


def _open_clip() -> Loss:
    loss: Loss = load_open_clip().loss.ClipLoss()
    return loss


_LOSSES: dict[str, Callable[[], Loss]] = {"ours": lambda: _ours, "naive": lambda: _naive, "open_clip": _open_clip}


def _features(num: int) -> tuple[Tensor, Tensor, Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, num, _EMBED_DIM, generator=generator)
    both /= both.norm(dim=-1, keepdim=True)  # in place: making the features must not be the peak
    image_ND, text_ND = both.to(device)
    logit_scale = torch.tensor(1 / 0.07, device=device)
    return image_ND.requires_grad_(), text_ND.requires_grad_(), logit_scale.requires_grad_()


def _forward_backward(loss: Loss, features: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    for tensor in features:
        tensor.grad = None
    value = loss(*features)
    value.backward()
    if value.is_cuda:
        torch.cuda.synchronize()
    return value.detach()


def _fitting_pairs() -> int:
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    pairs = _MEASURED_PAIRS
    while 4 * _WHOLE_MATRICES * pairs**2 > free / 2:
        pairs //= 2
    return pairs


def _prepare(name: str, num: int) -> Callable[[], Tensor]:
    loss = _LOSSES[name]()
    _forward_backward(loss, _features(64))  # so that libraries have what they keep
    features = _features(num)
    return lambda: _forward_backward(loss, features)
