"""SigLIP's sigmoid loss over the global batch (Zhai et al., 2023, algorithm 1).

    L = 1/N * sum_ij log(1 + exp(-z_ij (s i_i.t_j + b)))        z_ij = 1 where i = j, otherwise -1

with N pairs over all ranks, unit image and text features i, t, the logit scale s and the logit bias b. Every score
counts by itself, so a tile of the matrix gives its part of the loss and of the gradient at once: the forward pass
leaves nothing for the backward pass to do but to multiply.

Shapes: B pairs on this rank, M on the rank whose captions are visited, D embed_dim; a tile has I pictures, T captions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rayclip.config import LossConfig
from rayclip.distributed import rank
from rayclip.training.all_pairs import Sums, all_pairs_reduce
from rayclip.training.tiles import full_precision, inner_product, tiles, wide, wide_dtype

_LINEAR_ABOVE = 40.0  # where log(1 + exp(x)) is x, in float64 too


def sigmoid_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    batch_sizes: list[int],
    config: LossConfig = LossConfig(kind="sigmoid"),  # noqa: B008 (frozen)
) -> Tensor:
    """This rank's share of the loss: a scalar whose sum over ranks is the loss of the whole batch.

    What holds for `info_nce` of ranks, shares and gradients holds here; the forward pass alone is a collective.
    """
    loss: Tensor = _Sigmoid.apply(image_BD, text_BD, logit_scale, logit_bias, batch_sizes, config)
    return loss


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        image_BD: Tensor,
        text_BD: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        batch_sizes: list[int],
        config: LossConfig,
    ) -> Tensor:
        mine = rank()
        grad_image_BD = torch.zeros_like(image_BD, dtype=wide_dtype(image_BD))
        loss, grad_bias = grad_image_BD.new_zeros(2)

        def kernel(owner: int, rows: Sequence[Tensor], grad_text_MD: Tensor) -> None:
            (text_MD,) = rows
            for images, texts in tiles(len(image_BD), len(text_MD), config.tile_size):
                image_ID, text_TD = logit_scale * wide(image_BD[images]), wide(text_MD[texts])
                scores_IT = (image_ID @ text_TD.T).add_(logit_bias)
                loss.add_(F.softplus(scores_IT, threshold=_LINEAR_ABOVE).sum())
                matched = owner == mine and images == texts
                if matched:
                    loss.sub_(scores_IT.diagonal().sum())
                grad_IT = scores_IT.sigmoid_()
                if matched:
                    grad_IT.diagonal().sub_(1)
                grad_bias.add_(grad_IT.sum())
                grad_image_BD[images].addmm_(grad_IT, text_TD)
                grad_text_MD[texts].addmm_(grad_IT.T, image_ID)

        with full_precision(image_BD):
            sums = Sums(text_BD.shape[1:], 0.0, lambda parts: parts.sum(0))
            grad_text_BD = all_pairs_reduce([text_BD], sums, batch_sizes, config.distribution, kernel)
            # The scale multiplies every cosine, so its gradient is that of the pictures along themselves.
            grad_scale = inner_product(grad_image_BD, image_BD, config.tile_size)
            grad_image_BD *= logit_scale
        ctx.save_for_backward(grad_image_BD, grad_text_BD, grad_scale, grad_bias)
        ctx.num_pairs, ctx.dtypes = sum(batch_sizes), (image_BD.dtype, text_BD.dtype)  # type: ignore[attr-defined]
        return loss / sum(batch_sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad / ctx.num_pairs  # type: ignore[attr-defined]
        image, text, scale, bias = (factor * saved for saved in ctx.saved_tensors)  # type: ignore[attr-defined]
        image_dtype, text_dtype = ctx.dtypes  # type: ignore[attr-defined]
        return image.to(image_dtype), text.to(text_dtype), scale, bias, None, None
