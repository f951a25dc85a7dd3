"""The contrastive losses, by kind. None ever holds the matrix of all scores, or repeats on a rank another's work."""

from collections.abc import Callable, Sequence

from torch import Tensor

from rayclip.config import LossConfig
from rayclip.training.info_nce import info_nce
from rayclip.training.sigmoid import sigmoid_loss

LOSSES: dict[str, Callable[..., Tensor]] = {"info_nce": info_nce, "sigmoid": sigmoid_loss}


def contrastive_loss(outputs: Sequence[Tensor], batch_sizes: list[int], config: LossConfig) -> Tensor:
    """This rank's share of the loss that `config` names: a scalar whose sum over ranks is that of the whole batch.

    `outputs` are what a CLIP gives: both features, float [B, D], the logit scale, and the bias where it has one.
    """
    return LOSSES[config.kind](*outputs, batch_sizes, config)
