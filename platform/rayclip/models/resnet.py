"""The image tower of the CLIP paper's ResNets: three convolutions as a stem, strides that are preceded by an average
(so that they do not alias), and attention in place of the last average (Radford et al. 2021, section 2.4).

Shape suffixes: B pictures; H, W, C height, width, channels; P places of the last feature map; E its channels;
N = 1 + P; D embed_dim; A heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.config import ResNetConfig
from rayclip.models.vision import IMAGE_MEAN, IMAGE_STD

EXPANSION = 4  # a block's output channels over its inner ones
HEAD_WIDTH = 64


class ModifiedResNet(nn.Module):
    """A ResNet with a three-convolution stem and attention pooling, which is its projection to the shared space."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.image_size, self.embed_dim = config.image_size, embed_dim
        self.conv1, self.bn1 = _conv(3, width // 2, 3, stride=2), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = _conv(width // 2, width // 2, 3), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = _conv(width // 2, width, 3), nn.BatchNorm2d(width)
        channels = width
        for stage, num_blocks in enumerate(config.layers):
            inner = width << stage
            blocks = [Bottleneck(channels, inner, stride=1 if stage == 0 else 2)]
            channels = EXPANSION * inner
            blocks += [Bottleneck(channels, inner, stride=1) for _ in range(num_blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool((config.image_size // 32) ** 2, channels, embed_dim)
        self.register_buffer("mean", 255 * torch.tensor(IMAGE_MEAN), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGE_STD), persistent=False)

    def forward(self, image_BHWC: Tensor) -> Tensor:
        """Pictures in the shared space, not yet normalised.

        Args:
            image_BHWC: [B, image_size, image_size, 3] RGB; uint8, or floating and already normalised. With B = 0
                the statistics of the batch norms stay as they are.

        Returns:
            [B, embed_dim]

        Raises:
            ValueError: pictures of another shape.
        """
        x_BCHW = self._pixels(image_BHWC)
        if not len(x_BCHW):
            # Batch norm has no statistics of nothing; yet every parameter owes its ranks a gradient of zeros.
            nothing = torch.stack([p.sum() for p in self.parameters()]).sum() * 0
            return nothing.expand(0, self.embed_dim)
        x_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        x_BCHW = F.relu(self.bn2(self.conv2(x_BCHW)))
        x_BCHW = F.avg_pool2d(F.relu(self.bn3(self.conv3(x_BCHW))), 2)
        for stage in range(1, 5):
            x_BCHW = self.get_submodule(f"layer{stage}")(x_BCHW)
        return self.attnpool(x_BCHW)

    def _pixels(self, image_BHWC: Tensor) -> Tensor:
        side = self.image_size
        if tuple(image_BHWC.shape[1:]) != (side, side, 3):
            raise ValueError(f"pictures must be [B, {side}, {side}, 3]; these are {list(image_BHWC.shape)}")
        if not image_BHWC.is_floating_point():
            image_BHWC = (image_BHWC.float() - self.mean) / self.std
        # Channels stay last in memory, as they came: convolutions are fastest so.
        return image_BHWC.permute(0, 3, 1, 2).to(self.conv1.weight.dtype)


class Bottleneck(nn.Module):
    """Residual block of three convolutions; where it strides, both ways average first and then convolve."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = _conv(channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, EXPANSION * inner, 1), nn.BatchNorm2d(EXPANSION * inner)
        nn.init.zeros_(self.bn3.weight)  # each block starts as the identity
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != EXPANSION * inner:
            self.downsample = nn.Sequential(_conv(channels, EXPANSION * inner, 1), nn.BatchNorm2d(EXPANSION * inner))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """-> [B, 4 * inner, H / stride, W / stride]"""
        out = F.relu(self.bn1(self.conv1(x_BCHW)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self._shrink(out)))
        shortcut = x_BCHW if self.downsample is None else self.downsample(self._shrink(x_BCHW))
        return F.relu(out + shortcut)

    def _shrink(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW if self.stride == 1 else F.avg_pool2d(x_BCHW, self.stride)


class AttentionPool(nn.Module):
    """Attention from the mean of all places to the mean and the places, and on to the shared space."""

    def __init__(self, num_places: int, channels: int, embed_dim: int) -> None:
        super().__init__()
        std = channels**-0.5
        self.heads = channels // HEAD_WIDTH
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + num_places, channels))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, embed_dim)
        for linear in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x_BEHW: Tensor) -> Tensor:
        """-> [B, D]"""
        x_BPE = x_BEHW.flatten(2).transpose(1, 2)
        x_BNE = torch.cat([x_BPE.mean(dim=1, keepdim=True), x_BPE], dim=1) + self.positional_embedding
        # Only the mean's row is read, so only it asks.
        q, k, v = self.q_proj(x_BNE[:, :1]), self.k_proj(x_BNE), self.v_proj(x_BNE)
        q_BANd, k_BANd, v_BANd = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out_BA1d = F.scaled_dot_product_attention(q_BANd, k_BANd, v_BANd)
        return self.c_proj(out_BA1d.flatten(1))


def _conv(channels: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
