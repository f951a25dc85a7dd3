"""Named models: the CLIP paper's Vision Transformers (its table 20), and small ones for laptops.

A plain name uses GELU; NAME-quickgelu is the same model as OpenAI trained it, with QuickGELU.
"""

import math

from rayclip.config import ModelConfig, TextConfig, VisionConfig
from rayclip.errors import UserError, nearest

_TEXT_B = TextConfig(width=512, layers=12, heads=8)
_TEXT_L = TextConfig(width=768, layers=12, heads=12)


def _vit_b(patch_size: int) -> ModelConfig:
    vision = VisionConfig(image_size=224, patch_size=patch_size, width=768, layers=12, heads=12)
    return ModelConfig(embed_dim=512, vision=vision, text=_TEXT_B)


def _vit_l(image_size: int) -> ModelConfig:
    vision = VisionConfig(image_size=image_size, patch_size=14, width=1024, layers=24, heads=16)
    return ModelConfig(embed_dim=768, vision=vision, text=_TEXT_L)


def _small(image_size: int, patch_size: int, width: int, layers: int, context_length: int) -> ModelConfig:
    heads = width // 32
    return ModelConfig(
        embed_dim=width,
        vision=VisionConfig(image_size=image_size, patch_size=patch_size, width=width, layers=layers, heads=heads),
        text=TextConfig(context_length=context_length, width=width, layers=layers, heads=heads),
    )


_PUBLISHED = {
    "ViT-B/32": _vit_b(32),
    "ViT-B/16": _vit_b(16),
    "ViT-L/14": _vit_l(224),
    "ViT-L/14@336": _vit_l(336),
}

PRESETS: dict[str, ModelConfig] = {
    **_PUBLISHED,
    **{f"{name}-quickgelu": model.model_copy(update={"quick_gelu": True}) for name, model in _PUBLISHED.items()},
    "ViT-Nano/8@32": _small(32, 8, width=64, layers=2, context_length=32),
    "ViT-Micro/8@32": _small(32, 8, width=128, layers=4, context_length=32),
    "ViT-Mini/8@64": _small(64, 8, width=192, layers=6, context_length=32),
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
