"""AdamW as CLIP uses it, at a cost that follows the vocabulary in use."""

import inspect
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayclip.config import OptimizerConfig
from rayclip.models.clip import CLIP
from rayclip.models.vision import VisionTransformer

_HEADS = ("ln_post", "proj", "attnpool", "ln_final", "text_projection", "logit_scale", "logit_bias")


def build_optimizer(model: CLIP, config: OptimizerConfig) -> "RowAdamW":
    """AdamW for `model`, without decay for gains, biases, the class token and the logit scale.

    Makes the token embedding give row-sparse gradients: a batch touches a few thousand of its 49,408 rows at most, so
    a dense gradient is nearly all zeros, to be written, sent to every rank, and walked through by the optimizer.
    """
    # NCCL cannot add row-sparse gradients up.
    model.token_embedding.sparse = not dist.is_initialized() or dist.get_backend() == "gloo"
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates, members = layer_rates(model, config.layer_decay), defaultdict(list)
    for name, parameter in trained:
        members[rates[name], parameter.ndim >= 2].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": config.weight_decay if is_matrix else 0.0, "lr_scale": scale}
        for (scale, is_matrix), parameters in members.items()
    ]
    return RowAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def layer_rates(model: CLIP, decay: float) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by, by name: layer-wise decay (BEiT, arXiv:2106.08254).

    In each tower the head (last norm, projection, attention pool) has 1, the block below it `decay`, and so on down to
    the embeddings, or the stem. A ResNet's blocks are its four stages.
    """
    depth = {"image": 4, "text": len(model.transformer.resblocks)}
    if isinstance(model.visual, VisionTransformer):
        depth["image"] = len(model.visual.transformer.resblocks)
    rates = {}
    for name, _ in model.named_parameters():
        top = depth["image" if name.startswith("visual.") else "text"] + 1
        rates[name] = decay ** (top - _layer(name.removeprefix("visual."), top))
    return rates


def _layer(name: str, top: int) -> int:
    """The layer of a tower's parameter: 0 for what comes before the blocks, `top` for what comes after them."""
    block = re.match(r"transformer\.resblocks\.(\d+)\.|layer(\d)\.", name)
    if block:
        return int(block[1]) + 1 if block[1] else int(block[2])
    return top if name.startswith(_HEADS) else 0


class RowAdamW(torch.optim.AdamW):
    """AdamW that takes row-sparse gradients, and gives what dense AdamW gives for every row in use.

    A row is updated in every step from its first gradient on, as its momentum demands; before that it has no moments,
    and is left as it was initialised, where dense AdamW would only decay it.
    """

    # PyTorch keeps torch.compile out of these by decorators that import all of it first: more than a second of every
    # start, also where nothing is compiled. Without them they are the same; no optimizer is compiled here.
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    _step_dense = inspect.unwrap(torch.optim.AdamW.step)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for parameter, group in self._sparse_parameters():
            self._step_rows(parameter, parameter.grad, group)  # type: ignore[arg-type]
            parameter.grad = None
        return self._step_dense(closure)

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
