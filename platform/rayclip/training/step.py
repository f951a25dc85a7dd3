"""One optimizer step on one global batch."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from rayclip.config import GuardConfig, LossConfig
from rayclip.data.stream import Batch
from rayclip.distributed import all_gather_rows, gather_counts, reduce_counts
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.training.gradient import Inputs, forward_backward
from rayclip.training.guard import Anomaly, Guard

_FINITE = GuardConfig(min_logit_scale=None)


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks. `logit_scale` is that of the loss.

    Where there was trouble, the samples that could be read are not trained but left out.
    """

    loss: float
    num_trained: int
    num_skipped: int
    logit_scale: float
    grad_norm: float = math.nan
    num_left_out: int = 0
    anomaly: Anomaly | None = None
    stops: bool = False
    """Whether a rank wants the run to stop after this step."""


def train_step(
    net: nn.Module,
    model: CLIP,
    optimizer: Optimizer,
    batch: Batch,
    lr: float,
    max_grad_norm: float | None,
    loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
    micro_batch_size: int | None = None,
    guard: Guard | None = None,
    wants_stop: bool = False,
) -> StepResult:
    """Forward, backward and update on this rank's part of a global batch.

    `net` is `model`, or `model` wrapped for data parallelism. At most `micro_batch_size` pairs of this rank go through
    it at once, which changes memory and time and nothing else; None is all. Where `guard` finds trouble with the loss
    or its gradient, the weights stay as they are. Raises UserError, on every rank, for trouble that stops the run;
    without a guard that is a loss or a gradient that is not finite. Where `wants_stop` is true on any rank, `stops` is
    on all.
    """
    guard = guard or Guard(_FINITE, [])
    device = model.logit_scale.device
    real = np.flatnonzero(batch["num_tokens"])
    samples_consumed = int((batch["position"] >= 0).sum())
    counts = gather_counts([len(real), samples_consumed - len(real), int(wants_stop)], device)
    batch_sizes = [trained for trained, _, _ in counts]
    num_trained, num_skipped = sum(batch_sizes), sum(skipped for _, skipped, _ in counts)
    stops = any(wants for _, _, wants in counts)
    if not num_trained:
        return StepResult(math.nan, 0, num_skipped, model.logit_scale.exp().item(), stops=stops)

    logit_scale = model.logit_scale.detach().exp()
    optimizer.zero_grad(set_to_none=True)
    share = forward_backward(net, _inputs(batch, real), batch_sizes, device, loss, micro_batch_size)
    gradients = _gradients(model)
    norm = nn.utils.get_total_norm(gradients).to(device)
    total_loss, norms = reduce_counts(torch.stack([share, norm])).tolist()
    anomaly = guard.check(total_loss, norms)
    if anomaly is None:
        if max_grad_norm is not None:
            torch._foreach_mul_(gradients, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
        model.clamp_logit_scale_()
        anomaly = guard.check_scale(model.logit_scale.exp().item())
    result = StepResult(total_loss, num_trained, num_skipped, logit_scale.item(), norms / len(counts), stops=stops)
    if anomaly is None:
        return result
    anomaly = replace(anomaly, text=f"{anomaly.text}: {_identity(batch)}")
    if guard.stops_at(anomaly):
        raise UserError(anomaly.text)
    return replace(result, num_trained=0, num_left_out=num_trained, anomaly=anomaly)


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    """All gradients' numbers, to look at and to scale; of row-sparse ones, their summed rows."""
    values = []
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    return values


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
