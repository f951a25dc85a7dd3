"""In which precision the towers compute. Weights, features, loss and gradients are float32 whatever it is."""

import torch
from torch import Tensor, nn

from rayclip.config import Precision


def in_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """`model` as it is, or with its forward under bfloat16 autocast; both have the same parameters.

    bfloat16 has float32's range, so no gradient is scaled. The loss is taken outside of the forward, in float32.
    """
    return model if precision == "float32" else _Autocast(model)


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, tokens: Tensor, num_tokens: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(image.device.type, torch.bfloat16):
            features: tuple[Tensor, ...] = self.model(image, tokens, num_tokens)
        return features
