"""Symmetric InfoNCE over the global batch (Radford et al., 2021, figure 3).

    L = 1/(2N) * sum_i [ logsumexp_j(s i_i.t_j) + logsumexp_j(s t_i.i_j) - 2 s i_i.t_i ]

with N pairs over all ranks, unit image and text features i, t, and the logit scale s. A rank computes the rows of its
own pictures and of its own captions against everybody's features, so that no rank repeats another's work; the sum
over ranks is L.

Shapes: B pairs on this rank, N on all, D embed_dim.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rayclip.collective import rank


def info_nce(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, batch_sizes: list[int]) -> Tensor:
    """This rank's share of the loss: a scalar whose sum over ranks is the loss of the whole batch.

    `batch_sizes` holds every rank's number of pairs, which may differ and may be zero. The gradient of the sum of
    all ranks' shares reaches each rank's features through the gather, so parameter gradients must be summed over
    ranks, not averaged.
    """
    image_ND, text_ND = _gather_pair(image_BD, text_BD, batch_sizes)
    first = sum(batch_sizes[: rank()])
    target_B = torch.arange(first, first + len(image_BD), device=image_BD.device)
    by_image = F.cross_entropy(logit_scale * image_BD @ text_ND.T, target_B, reduction="sum")
    by_text = F.cross_entropy(logit_scale * text_BD @ image_ND.T, target_B, reduction="sum")
    return (by_image + by_text) / (2 * sum(batch_sizes))


def _gather_pair(image_BD: Tensor, text_BD: Tensor, batch_sizes: list[int]) -> tuple[Tensor, Tensor]:
    if len(batch_sizes) == 1:
        return image_BD, text_BD
    both: Tensor = _GatherRows.apply(torch.cat([image_BD, text_BD], dim=1), batch_sizes)
    image_ND, text_ND = both.chunk(2, dim=1)
    return image_ND, text_ND


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, in order of rank. Backward gives a rank the sum of all ranks' gradients for its rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows_BD: Tensor, batch_sizes: list[int]) -> Tensor:
        ctx.batch_sizes = batch_sizes  # type: ignore[attr-defined]
        longest = max(batch_sizes)
        # Collectives want one shape on every rank, so shorter ranks send zeros that are cut off again.
        padded = rows_BD.new_zeros(longest, rows_BD.shape[1])
        padded[: len(rows_BD)] = rows_BD
        gathered = rows_BD.new_empty(len(batch_sizes) * longest, rows_BD.shape[1])
        dist.all_gather_into_tensor(gathered, padded)
        parts = gathered.split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, batch_sizes, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        grad_ND = grads[0].contiguous()
        dist.all_reduce(grad_ND)
        return grad_ND.split(ctx.batch_sizes)[rank()], None  # type: ignore[attr-defined]
