"""The image tower: a Vision Transformer read at its class token.

Shape suffixes: B pictures; P patches a picture; K those of them that are computed; W width; N = 1 + K tokens a
picture; T = B * N tokens; C colour channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.config import VisionConfig
from rayclip.models.transformer import Transformer

# Statistics of the pictures that OpenAI trained CLIP on, RGB, for pixels in 0..1.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTransformer(nn.Module):
    """ViT with a class token, a layer norm before the blocks, and a projection to the shared space."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.image_size, self.patch_size, self.patch_dropout = config.image_size, patch, config.patch_dropout
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + (config.image_size // patch) ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, quick_gelu, config.mlp_ratio)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))
        self.register_buffer("mean", 255 * torch.tensor(IMAGE_MEAN).view(3, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGE_STD).view(3, 1), persistent=False)

    def forward(self, image_BHWC: Tensor) -> Tensor:
        """Pictures in the shared space, not yet normalised. -> [B, embed_dim]"""
        return self.pool(image_BHWC) @ self.proj

    def pool(self, image_BHWC: Tensor) -> Tensor:
        """Features before the projection, which linear probes use.

        In training, `patch_dropout` leaves a random part of every picture's patches out (FLIP, arXiv:2212.00794).

        Args:
            image_BHWC: [B, image_size, image_size, 3] RGB; uint8, or floating and already normalised.

        Returns:
            [B, width]

        Raises:
            ValueError: pictures of another shape.
        """
        patches_BKC = self._patches(image_BHWC)
        position: Tensor = self.positional_embedding  # [N, W], or, of each picture's own patches, [B, N, W]
        if self.training and self.patch_dropout:
            # Before the projection, so that what is left out costs nothing.
            kept_BK = self._draw(*patches_BKC.shape[:2]).to(patches_BKC.device, non_blocking=True)
            patches_BKC = patches_BKC.take_along_dim(kept_BK[..., None], dim=1)
            position = F.embedding(F.pad(kept_BK + 1, (1, 0)), position)
        patches_BKW = F.linear(patches_BKC, self.conv1.weight.flatten(1))
        batch, num_patches, width = patches_BKW.shape
        first = self.class_embedding.expand(batch, 1, width)
        x_BNW = torch.cat([first, patches_BKW], dim=1) + position
        length = 1 + num_patches
        # Flattened before and not after: compiled code for a view would be one more.
        x_TW = self.ln_pre(x_BNW.view(batch * length, width))
        rows_B = torch.arange(0, batch * length, length, device=x_TW.device)
        return self.ln_post(self.transformer(x_TW, rows_B, [(batch, length)], causal=False))

    def _draw(self, batch: int, num_patches: int) -> Tensor:
        """A random subset of each picture's patches, in order, int64 [B, K].

        It is drawn on the host: that generator's state is in every checkpoint.
        """
        num_kept = max(1, round(num_patches * (1 - self.patch_dropout)))
        return torch.rand(batch, num_patches, device="cpu").argsort(dim=1)[:, :num_kept].sort(dim=1).values

    def _patches(self, image_BHWC: Tensor) -> Tensor:
        """Cut into normalised patches, flattened as conv1's weight is. -> [B, P, 3 * patch * patch]"""
        side, patch = self.image_size, self.patch_size
        if tuple(image_BHWC.shape[1:]) != (side, side, 3):
            raise ValueError(f"pictures must be [B, {side}, {side}, 3]; these are {list(image_BHWC.shape)}")
        batch, grid = image_BHWC.shape[0], side // patch
        # The shuffle runs on uint8 where it can: a quarter of the memory traffic.
        x = image_BHWC.view(batch, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4)
        x_BPCpp = x.reshape(batch, grid * grid, 3, patch * patch)
        if not x_BPCpp.is_floating_point():
            x_BPCpp = (x_BPCpp.float() - self.mean) / self.std
        return x_BPCpp.flatten(2).to(self.conv1.weight.dtype)
