"""A CLIP with its tokenizer on a device: texts and pictures in, features out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.models.clip import CLIP
from rayclip.models.vision import VisionTransformer

Tokenizer = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class Encoder:
    """Features of texts and pictures, in batches, without gradients.

    The model is moved to the device and, while it encodes, put into eval mode; each of its modules gets the mode
    it had back afterwards, so a model in the middle of its training can be encoded with.
    """

    def __init__(self, model: CLIP, tokenizer: Tokenizer, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.tokenizer = tokenizer

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before the softmax: exp of the model's parameter."""
        return float(self.model.logit_scale.detach().exp())

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Features of N texts: float32 [N, E], L2-normalised, on the encoder's device."""

        def encode(start: int) -> Tensor:
            tokens, num_tokens = self.tokenizer(texts[start : start + batch_size])
            # The text tower lays captions out by their lengths on the host: those stay there.
            return self.model.encode_text(torch.from_numpy(tokens).to(self.device), torch.from_numpy(num_tokens))

        return self._encode_batches(encode, len(texts), batch_size)

    def encode_images(self, images: np.ndarray | Tensor, batch_size: int = 256) -> Tensor:
        """Features of N pictures, uint8 RGB [N, H, W, 3]: float32 [N, E], L2-normalised, on the encoder's device.

        Raises ValueError where the pictures have another shape or dtype.
        """
        pixels = torch.as_tensor(images)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"pictures must be uint8 [N, H, W, 3], got {pixels.dtype} {list(pixels.shape)}")

        def encode(start: int) -> Tensor:
            return self.model.encode_image(pixels[start : start + batch_size].to(self.device))

        return self._encode_batches(encode, len(pixels), batch_size)

    def encode_pooled(self, images: np.ndarray | Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Features as `encode_images`, and those that linear probes use, float32 [N, W]: of a ViT before the
        projection (appendix A.3 of the paper); a ResNet's attention pool has none, so those are its features, not yet
        normalised.
        """
        visual = self.model.visual

        def encode(start: int) -> Tensor:
            pixels = torch.as_tensor(images[start : start + batch_size]).to(self.device)
            return visual.pool(pixels) if isinstance(visual, VisionTransformer) else visual(pixels)

        width = visual.proj.shape[0] if isinstance(visual, VisionTransformer) else self.model.config.embed_dim
        pooled_NW = self._encode_batches(encode, len(images), batch_size, width)
        with torch.no_grad():
            features_NE = pooled_NW @ visual.proj if isinstance(visual, VisionTransformer) else pooled_NW
            return F.normalize(features_NE, dim=-1), pooled_NW

    def _encode_batches(self, encode: Callable[[int], Tensor], total: int, batch_size: int, width: int = 0) -> Tensor:
        with torch.inference_mode(), _eval_mode(self.model):
            parts = [encode(start).float() for start in range(0, total, batch_size)]
        if not parts:
            return torch.empty(0, width or self.model.text_projection.shape[1], device=self.device)
        # Outside inference mode: the result is an ordinary tensor, which a probe may differentiate through.
        return torch.cat(parts)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode back at the end: a frozen part of the model stays in eval."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
