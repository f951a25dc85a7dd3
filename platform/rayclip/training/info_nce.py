"""Symmetric InfoNCE over the global batch (Radford et al., 2021, figure 3).

    L = 1/(2N) * sum_i [ logsumexp_j(s i_i.t_j) + logsumexp_j(s t_i.i_j) - 2 s i_i.t_i ]

with N pairs over all ranks, unit image and text features i, t, and the logit scale s. The matrix of scores s i_i.t_j
is computed in tiles: once forward, where a tile adds to the log-sum-exp of its rows and of its columns, and once more
backward, where it gives the gradient of both sides. A rank computes the rows of its own pictures, against the captions
of all ranks, so that no rank repeats another's work.

Shapes: B pairs on this rank, M on the rank whose captions are visited, D embed_dim; a tile has I pictures, T captions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rayclip.config import LossConfig
from rayclip.distributed import rank
from rayclip.training.all_pairs import Sums, all_pairs_reduce
from rayclip.training.tiles import full_precision, inner_product, tiles, wide, wide_dtype


def info_nce(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    batch_sizes: list[int],
    config: LossConfig = LossConfig(),  # noqa: B008 (frozen)
) -> Tensor:
    """This rank's share of the loss: a scalar whose sum over ranks is the loss of the whole batch.

    `batch_sizes` holds every rank's number of pairs, which may differ and may be zero. Forward and backward are
    collectives, the latter called with the same factor on every rank. A rank's features get the gradient of the sum
    of all shares, so parameter gradients must be summed over ranks, not averaged.
    """
    loss: Tensor = _InfoNCE.apply(image_BD, text_BD, logit_scale, batch_sizes, config)
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        image_BD: Tensor,
        text_BD: Tensor,
        logit_scale: Tensor,
        batch_sizes: list[int],
        config: LossConfig,
    ) -> Tensor:
        mine, wanted = rank(), wide_dtype(image_BD)
        by_image_B = image_BD.new_full((len(image_BD),), -math.inf, dtype=wanted)
        matched_B = torch.empty_like(by_image_B)

        def kernel(owner: int, rows: Sequence[Tensor], by_text_M: Tensor) -> None:
            (text_MD,) = rows
            for images, texts in tiles(len(image_BD), len(text_MD), config.tile_size):
                scores_IT = (logit_scale * wide(image_BD[images])) @ wide(text_MD[texts]).T
                _add_logsumexp_(by_image_B[images], scores_IT, dim=1)
                _add_logsumexp_(by_text_M[texts], scores_IT, dim=0)
                if owner == mine and images == texts:
                    matched_B[images] = scores_IT.diagonal()

        with full_precision(image_BD):
            sums = Sums((), -math.inf, lambda parts: parts.logsumexp(0))
            by_text_B = all_pairs_reduce([text_BD], sums, batch_sizes, config.distribution, kernel)
            loss = (by_image_B - matched_B).sum() + (by_text_B - matched_B).sum()
        ctx.save_for_backward(image_BD, text_BD, logit_scale, by_image_B, by_text_B)
        ctx.batch_sizes, ctx.config = batch_sizes, config  # type: ignore[attr-defined]
        return loss / (2 * sum(batch_sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_BD, logit_scale, by_image_B, by_text_B = ctx.saved_tensors  # type: ignore[attr-defined]
        batch_sizes: list[int] = ctx.batch_sizes  # type: ignore[attr-defined]
        config: LossConfig = ctx.config  # type: ignore[attr-defined]
        mine = rank()
        grad_image_BD = torch.zeros_like(image_BD, dtype=by_image_B.dtype)

        def kernel(owner: int, rows: Sequence[Tensor], grad_text_MD: Tensor) -> None:
            text_MD, by_text_M = rows
            for images, texts in tiles(len(image_BD), len(text_MD), config.tile_size):
                image_ID, text_TD = logit_scale * wide(image_BD[images]), wide(text_MD[texts])
                scores_IT = image_ID @ text_TD.T
                grad_IT = (scores_IT - by_image_B[images, None]).exp_()
                grad_IT += scores_IT.sub_(by_text_M[texts]).exp_()
                if owner == mine and images == texts:
                    grad_IT.diagonal().sub_(2)
                grad_image_BD[images].addmm_(grad_IT, text_TD)
                grad_text_MD[texts].addmm_(grad_IT.T, image_ID)

        with full_precision(image_BD):
            sums = Sums(text_BD.shape[1:], 0.0, lambda parts: parts.sum(0))
            grad_text_BD = all_pairs_reduce([text_BD, by_text_B], sums, batch_sizes, config.distribution, kernel)
            factor = grad / (2 * sum(batch_sizes))
            # The scale multiplies every score, so its gradient is that of the pictures along themselves.
            grad_scale = factor * inner_product(grad_image_BD, image_BD, config.tile_size)
            grad_image_BD *= factor * logit_scale
            grad_text_BD *= factor
        return grad_image_BD.to(image_BD.dtype), grad_text_BD.to(text_BD.dtype), grad_scale, None, None


def _add_logsumexp_(sums: Tensor, scores_IT: Tensor, dim: int) -> None:
    torch.logaddexp(sums, scores_IT.logsumexp(dim), out=sums)
