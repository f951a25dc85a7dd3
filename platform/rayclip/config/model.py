"""Settings of a model: its two towers and the space they share."""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayclip.config.base import Config


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"heads {heads} does not divide width {width}")


class VisionConfig(Config):
    """The image tower: a Vision Transformer."""

    kind: Literal["vit"] = Field("vit", description="a Vision Transformer; the default")
    image_size: int = Field(224, gt=0, description="side of the square input picture, in pixels")
    patch_size: int = Field(32, gt=0, description="side of a patch, in pixels; divides image_size")
    width: int = Field(768, gt=0, description="width of the residual stream")
    layers: int = Field(12, gt=0, description="number of transformer blocks")
    heads: int = Field(12, gt=0, description="attention heads; divides width")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the MLP over that of the stream, the product rounded")
    patch_dropout: float = Field(0.0, ge=0, lt=1, description="share of a picture's patches that training leaves out")

    @model_validator(mode="after")
    def _divisible(self) -> "VisionConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        _check_heads(self.width, self.heads)
        return self


class ResNetConfig(Config):
    """The image tower: the CLIP paper's modified ResNet, with attention pooling."""

    kind: Literal["resnet"] = Field("resnet", description="a modified ResNet")
    image_size: int = Field(224, gt=0, multiple_of=32, description="side of the square input picture, in pixels")
    width: int = Field(64, gt=0, multiple_of=2, description="channels after the stem; the pool has half as many heads")
    layers: tuple[int, int, int, int] = Field((3, 4, 6, 3), description="bottleneck blocks of each of the four stages")

    @model_validator(mode="after")
    def _no_empty_stage(self) -> "ResNetConfig":
        if min(self.layers) < 1:
            raise ValueError(f"layers {list(self.layers)} must be four numbers of at least 1")
        return self


class TextConfig(Config):
    """The text tower: a causal transformer read at the end token."""

    context_length: int = Field(77, gt=2, description="most tokens a caption may have, start and end included")
    vocab_size: int = Field(49_408, gt=2, description="size of the byte-pair vocabulary")
    width: int = Field(512, gt=0, description="width of the residual stream")
    layers: int = Field(12, gt=0, description="number of transformer blocks")
    heads: int = Field(8, gt=0, description="attention heads; divides width")

    @model_validator(mode="after")
    def _divisible(self) -> "TextConfig":
        _check_heads(self.width, self.heads)
        return self


class ModelConfig(Config):
    """A CLIP: two towers and the space they share."""

    embed_dim: int = Field(512, gt=0, description="dimension of the shared space")
    vision: VisionConfig | ResNetConfig = Field(VisionConfig(), discriminator="kind", description="the image tower")
    text: TextConfig = Field(TextConfig(), description="the text tower")
    quick_gelu: bool = Field(False, description="x * sigmoid(1.702 x) in place of GELU, as in OpenAI's weights")
    init_logit_scale: float = Field(math.log(1 / 0.07), ge=0, le=math.log(100), description="the scale's logarithm")
    init_logit_bias: float | None = Field(None, description="added to scores, for loss.kind=sigmoid; None has no bias")

    @field_validator("vision", mode="before")
    @classmethod
    def _kind(cls, vision: Any) -> Any:
        """A tower that does not say its kind is a Vision Transformer: once there were no others."""
        return {"kind": "vit", **vision} if isinstance(vision, dict) else vision
