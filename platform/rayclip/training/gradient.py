"""The loss of a global batch and its gradient."""

import torch
from torch import Tensor, nn

from rayclip.collective import world_size
from rayclip.training.loss import info_nce

Inputs = tuple[Tensor, Tensor, Tensor]
"""Pictures, tokens and their numbers, on the host: what a model is called with."""


def forward_backward(net: nn.Module, inputs: Inputs, batch_sizes: list[int], device: torch.device) -> Tensor:
    """Add the gradient of the whole batch's loss to the parameters; -> this rank's share of the loss, a scalar.

    `net` is the model, or the model wrapped for data parallelism; `batch_sizes` holds every rank's number of pairs.
    """
    image, text, logit_scale = net(*_to(inputs, device))
    loss = info_nce(image, text, logit_scale, batch_sizes)
    # Data parallelism averages gradients over ranks; shares of one loss must be summed.
    (loss * world_size()).backward()
    return loss.detach()


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    image, tokens, num_tokens = inputs
    return image.to(device, non_blocking=True), tokens.to(device, non_blocking=True), num_tokens
