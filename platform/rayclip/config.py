"""Every job's settings: pydantic, frozen, unknown keys refused, each key described once, here."""

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Base of all settings: immutable, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class VisionConfig(Config):
    """The image tower: a Vision Transformer."""

    image_size: int = Field(224, gt=0, description="side of the square input picture, in pixels")
    patch_size: int = Field(32, gt=0, description="side of a patch, in pixels; divides image_size")
    width: int = Field(768, gt=0, description="width of the residual stream")
    layers: int = Field(12, gt=0, description="number of transformer blocks")
    heads: int = Field(12, gt=0, description="attention heads; divides width")


class TextConfig(Config):
    """The text tower: a causal transformer read at the end token."""

    context_length: int = Field(77, gt=2, description="most tokens a caption may have, start and end included")
    vocab_size: int = Field(49_408, gt=2, description="size of the byte-pair vocabulary")
    width: int = Field(512, gt=0, description="width of the residual stream")
    layers: int = Field(12, gt=0, description="number of transformer blocks")
    heads: int = Field(8, gt=0, description="attention heads; divides width")


class ModelConfig(Config):
    """A CLIP: two towers and the space they share."""

    embed_dim: int = Field(512, gt=0, description="dimension of the shared space")
    vision: VisionConfig = Field(VisionConfig(), description="the image tower")
    text: TextConfig = Field(TextConfig(), description="the text tower")
    quick_gelu: bool = Field(False, description="x * sigmoid(1.702 x) in place of GELU, as in OpenAI's weights")
