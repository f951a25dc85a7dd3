"""One optimizer step on one global batch."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from rayclip.collective import all_gather_rows, gather_counts, reduce_counts
from rayclip.config import LossConfig
from rayclip.data.stream import Batch
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.training.gradient import Inputs, forward_backward


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks."""

    loss: float
    num_trained: int
    num_skipped: int
    logit_scale: float


def train_step(
    net: nn.Module,
    model: CLIP,
    optimizer: Optimizer,
    batch: Batch,
    lr: float,
    max_grad_norm: float | None,
    loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
    micro_batch_size: int | None = None,
) -> StepResult:
    """Forward, backward and update on this rank's part of a global batch.

    `net` is `model`, or `model` wrapped for data parallelism. At most `micro_batch_size` pairs of this rank go through
    it at once, which changes memory and time and nothing else; None is all. Raises UserError, on every rank, where
    the loss is not finite; the weights are then those before the step.
    """
    device = model.logit_scale.device
    real = np.flatnonzero(batch["num_tokens"])
    num_given = int((batch["position"] >= 0).sum())
    counts = gather_counts([len(real), num_given - len(real)], device)
    batch_sizes = [trained for trained, _ in counts]
    num_trained, num_skipped = sum(batch_sizes), sum(skipped for _, skipped in counts)
    if not num_trained:
        return StepResult(math.nan, 0, num_skipped, model.logit_scale.exp().item())

    logit_scale = model.logit_scale.detach().exp()
    optimizer.zero_grad(set_to_none=True)
    share = forward_backward(net, _inputs(batch, real), batch_sizes, device, loss, micro_batch_size)
    total_loss = reduce_counts(share).item()
    if not math.isfinite(total_loss):
        raise UserError(f"the loss is {total_loss}: {_identity(batch)}")
    if max_grad_norm is not None:
        _clip_gradient(model, max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    model.clamp_logit_scale_()
    return StepResult(total_loss, num_trained, num_skipped, logit_scale.item())


def _clip_gradient(model: nn.Module, max_norm: float) -> None:
    """nn.utils.clip_grad_norm_, which has no norm for row-sparse gradients: theirs is that of their summed rows."""
    values = []
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    scale = (max_norm / (nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)


def _inputs(batch: Batch, rows: np.ndarray) -> Inputs:
    # Most batches have nothing to leave out, and then nothing is copied.
    whole = len(rows) == len(batch["num_tokens"])
    arrays = (batch["image"], batch["tokens"], batch["num_tokens"])
    image, tokens, num_tokens = (torch.from_numpy(array if whole else array[rows]) for array in arrays)
    return image, tokens, num_tokens


def _identity(batch: Batch) -> str:
    mine = np.stack([batch["position"], batch["row"].astype(np.int64)], axis=1)[batch["num_tokens"] > 0]
    everyone = all_gather_rows(torch.from_numpy(mine))
    positions = everyone[:, 0].unique().tolist()
    return f"the batch holds {len(everyone)} samples of stream positions {', '.join(map(str, positions))}"
