"""AdamW as CLIP uses it, at a cost that follows the vocabulary in use."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayclip.config import OptimizerConfig
from rayclip.models.clip import CLIP


def build_optimizer(model: CLIP, config: OptimizerConfig) -> "RowAdamW":
    """AdamW for `model`, without decay for gains, biases, the class token and the logit scale.

    Makes the token embedding give row-sparse gradients: a batch touches a few thousand of its 49,408 rows at most, so
    a dense gradient is nearly all zeros, to be written, sent to every rank, and walked through by the optimizer.
    """
    # NCCL cannot add row-sparse gradients up.
    model.token_embedding.sparse = not dist.is_initialized() or dist.get_backend() == "gloo"
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return RowAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class RowAdamW(torch.optim.AdamW):
    """AdamW that takes row-sparse gradients, and gives what dense AdamW gives for every row in use.

    A row is updated in every step from its first gradient on, as its momentum demands; before that it has no moments,
    and is left as it was initialised, where dense AdamW would only decay it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for parameter, group in self._sparse_parameters():
            self._step_rows(parameter, parameter.grad, group)  # type: ignore[arg-type]
            parameter.grad = None
        return super().step(closure)

    def _sparse_parameters(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        return [(p, group) for p, group in pairs if p.grad is not None and p.grad.is_sparse]

    def _step_rows(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        grad = grad.coalesce()
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if "used" not in state:  # also after a restart from dense gradients
            state["used"] = state["exp_avg_sq"].any(dim=1)
        touched = grad.indices()[0]
        state["used"][touched] = True
        rows = state["used"].nonzero().squeeze(1)
        dense_grad = parameter.new_zeros(len(rows), parameter.shape[1])
        dense_grad[torch.searchsorted(rows, touched)] = grad.values()
        wholes = (parameter, state["exp_avg"], state["exp_avg_sq"])
        weight, exp_avg, exp_avg_sq = parts = [whole.index_select(0, rows) for whole in wholes]
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [weight], [dense_grad], [exp_avg], [exp_avg_sq], [], [state["step"].add_(1)],
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip
        for whole, part in zip(wholes, parts, strict=True):
            whole.index_copy_(0, rows, part)
