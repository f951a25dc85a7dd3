"""Named models: the CLIP paper's (its tables 18 to 20), those that open_clip added, and small ones for laptops.

A plain name uses GELU; NAME-quickgelu is the same model as OpenAI trained it, with QuickGELU.
"""

import math

from rayclip.config import ModelConfig, ResNetConfig, TextConfig, VisionConfig
from rayclip.errors import UserError, nearest

_HEAD_WIDTH = 64


def _text(width: int, layers: int = 12) -> TextConfig:
    return TextConfig(width=width, layers=layers, heads=width // _HEAD_WIDTH)


def _resnet(embed_dim: int, image_size: int, layers: tuple[int, int, int, int], width: int, text: int) -> ModelConfig:
    vision = ResNetConfig(image_size=image_size, width=width, layers=layers)
    return ModelConfig(embed_dim=embed_dim, vision=vision, text=_text(text))


def _vit(
    embed_dim: int,
    patch_size: int,
    width: int,
    text: TextConfig,
    layers: int = 12,
    heads: int | None = None,
    image_size: int = 224,
    mlp_ratio: float = 4.0,
) -> ModelConfig:
    heads = heads or width // _HEAD_WIDTH
    vision = VisionConfig(
        image_size=image_size, patch_size=patch_size, width=width, layers=layers, heads=heads, mlp_ratio=mlp_ratio
    )
    return ModelConfig(embed_dim=embed_dim, vision=vision, text=text)


def _small(image_size: int, patch_size: int, width: int, layers: int, context_length: int) -> ModelConfig:
    heads = width // 32
    return ModelConfig(
        embed_dim=width,
        vision=VisionConfig(image_size=image_size, patch_size=patch_size, width=width, layers=layers, heads=heads),
        text=TextConfig(context_length=context_length, width=width, layers=layers, heads=heads),
    )


_PUBLISHED = {
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), width=64, text=512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), width=64, text=512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), width=80, text=640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), width=96, text=768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), width=128, text=1024),
    "ViT-B/32": _vit(512, 32, 768, _text(512)),
    "ViT-B/16": _vit(512, 16, 768, _text(512)),
    "ViT-L/14": _vit(768, 14, 1024, _text(768), layers=24),
    "ViT-L/14@336": _vit(768, 14, 1024, _text(768), layers=24, image_size=336),
}

_OPEN_CLIP = {
    "ViT-S/32": _vit(384, 32, 384, _text(384)),
    "ViT-S/16": _vit(384, 16, 384, _text(384)),
    "ViT-S/32-alt": _vit(256, 32, 384, _text(256, layers=10)),
    "ViT-S/16-alt": _vit(256, 16, 384, _text(256, layers=10)),
    "ViT-M/32": _vit(512, 32, 512, _text(512)),
    "ViT-M/16": _vit(512, 16, 512, _text(512)),
    "ViT-M/32-alt": _vit(384, 32, 512, _text(384)),
    "ViT-H/14": _vit(1024, 14, 1280, _text(1024, layers=24), layers=32, heads=16),
    "ViT-g/14": _vit(1024, 14, 1408, _text(1024, layers=24), layers=40, heads=16, mlp_ratio=4.3636),
}

_LAPTOP = {
    "ViT-Nano/8@32": _small(32, 8, width=64, layers=2, context_length=32),
    "ViT-Micro/8@32": _small(32, 8, width=128, layers=4, context_length=32),
    "ViT-Mini/8@64": _small(64, 8, width=192, layers=6, context_length=32),
}

PRESETS: dict[str, ModelConfig] = {
    **_PUBLISHED,
    **{f"{name}-quickgelu": model.model_copy(update={"quick_gelu": True}) for name, model in _PUBLISHED.items()},
    **_OPEN_CLIP,
    **_LAPTOP,
}


def preset(name: str) -> ModelConfig:
    """The model of that name.

    Raises:
        UserError: no such name; says the nearest.
    """
    if name not in PRESETS:
        raise UserError(f"no model is called '{name}': {nearest(name, list(PRESETS))}")
    return PRESETS[name]


def with_logit_bias(model: ModelConfig) -> ModelConfig:
    """The model with the bias that the sigmoid loss needs, bias and scale beginning as SigLIP's do (-10 and ln 10).

    One that has a bias stays as it is.
    """
    if model.init_logit_bias is not None:
        return model
    return model.model_copy(update={"init_logit_scale": math.log(10), "init_logit_bias": -10.0})
