"""The exponential moving average of a model's weights: often better than the weights that it follows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rayclip.config import EmaConfig


class Ema:
    """Average after average: avg <- weights + (avg - weights) * 2^(-samples / half_life), after a step on `samples`.

    So an average means the same at any batch size: what the weights were `half_life` samples ago counts half of what
    they are. It begins at the model's weights, and covers all that a checkpoint holds of a model: buffers too, of
    which those that are no floating numbers are taken as they are.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self._model, self._half_life = model, config.half_life_samples
        self._average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, num_samples: int) -> None:
        """Follow the model by a step on that many samples, over all ranks."""
        decay = 0.5 ** (num_samples / self._half_life)
        pairs = [(self._average[name], tensor) for name, tensor in self._model.state_dict().items()]
        averaged = [(average, tensor) for average, tensor in pairs if average.is_floating_point()]
        averages, tensors = [average for average, _ in averaged], [tensor for _, tensor in averaged]
        torch._foreach_lerp_(averages, tensors, 1 - decay)
        for average, tensor in pairs:
            if not average.is_floating_point():
                average.copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average's weights inside, and its own again afterwards, to the bit; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The average of each of the model's tensors, by name."""
        return self._average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave, which has the model's names."""
        assert state.keys() == self._average.keys()
        for name, average in self._average.items():
            average.copy_(state[name])

    def _swap(self) -> None:
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            tensor.data, self._average[name] = self._average[name], tensor.data
