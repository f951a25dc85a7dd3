"""What is watched in every step, so that one bad batch does not cost a run: and the way back.

What is judged are numbers that all ranks share, so all ranks judge alike.
"""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rayclip.config import GuardConfig
from rayclip.training.checkpoint import RunState
from rayclip.training.ema import Ema

_MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

_LEAST_SPREAD = 0.01
"""Of the median: losses that hardly move make no spike of one that does a little."""


@dataclass(frozen=True)
class Anomaly:
    """`cause` is one of decode.GUARD_CAUSES, `text` is for people."""

    cause: str
    text: str


class Guard:
    """Judges steps by `config`. `losses` are those of the last steps, of which it keeps `config.window`."""

    def __init__(self, config: GuardConfig, losses: list[float]) -> None:
        self.config, self._losses = config, losses

    def check(self, loss: float, grad_norm: float) -> Anomaly | None:
        """What forbids an update with this gradient; a loss without trouble is remembered."""
        if not math.isfinite(loss):
            return Anomaly("loss_not_finite", f"the loss is {loss}")
        if not math.isfinite(grad_norm):
            return Anomaly("gradient_not_finite", f"the loss is {loss:.4g} and the norm of its gradient {grad_norm}")
        if self.config.spike_threshold is None:
            return None
        if len(self._losses) >= self.config.window // 2 and (spike := self._spike(loss)):
            return spike
        self._losses.append(loss)
        del self._losses[: -self.config.window]
        return None

    def check_scale(self, logit_scale: float) -> Anomaly | None:
        """What is wrong with the logit scale that an update came to."""
        least = self.config.min_logit_scale
        if least is None or logit_scale > least:
            return None
        return Anomaly("logit_scale_collapsed", f"the logit scale has collapsed to {logit_scale:.4g}")

    def stops_at(self, anomaly: Anomaly) -> bool:
        """Whether it ends the run. A collapsed scale is in the weights already: leaving a batch out mends nothing."""
        action = self.config.action
        return action == "stop" or (action == "skip" and anomaly.cause == "logit_scale_collapsed")

    def _spike(self, loss: float) -> Anomaly | None:
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(other - median) for other in self._losses)
        sigma = max(_MAD_TO_SIGMA * deviation, _LEAST_SPREAD * abs(median), 1e-9)
        height = (loss - median) / sigma
        if height <= (self.config.spike_threshold or math.inf):
            return None
        text = f"the loss is {loss:.4g}, {height:.1f} deviations above the median of the last steps, {median:.4g}"
        return Anomaly("loss_spike", text)


class Snapshot:
    """Weights, optimizer and average as they are now, kept in the host's memory, to go back to."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, ema: Ema | None, state: RunState) -> None:
        self._model, self._optimizer, self._ema = model, optimizer, ema
        self._weights = [_keep(tensor) for tensor in self._tensors()]
        self._slots = {p: {slot: _keep(t) for slot, t in slots.items()} for p, slots in optimizer.state.items()}
        # Samples that were skipped, and the ledger, change with checkpoints only.
        self._progress = (state.samples_seen, state.steps, list(state.recent_losses))

    @torch.no_grad()
    def restore(self, state: RunState) -> None:
        """Make all of it as it was, in place."""
        for tensor, (kept, _) in zip(self._tensors(), self._weights, strict=True):
            tensor.copy_(kept)
        self._optimizer.state.clear()
        for parameter, slots in self._slots.items():
            self._optimizer.state[parameter] = {slot: t.to(device, copy=True) for slot, (t, device) in slots.items()}
        state.samples_seen, state.steps, state.recent_losses[:] = self._progress

    def _tensors(self) -> list[Tensor]:
        averages = self._ema.state_dict().values() if self._ema else ()
        return [*self._model.state_dict().values(), *averages]


def _keep(tensor: Tensor) -> tuple[Tensor, torch.device]:
    return tensor.detach().to("cpu", copy=True), tensor.device
