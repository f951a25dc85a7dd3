"""open_clip's open_clip_config.json, both ways. Its weights have our names."""

from typing import Any

from rayclip.config import ModelConfig, VisionConfig
from rayclip.errors import UserError
from rayclip.models.vision import IMAGE_MEAN, IMAGE_STD

_VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_HEAD_WIDTH = 64
_NONE: tuple[object, ...] = (None, False, {})


def read_settings(settings: dict[str, Any]) -> tuple[bool, tuple[int | None, int]]:
    """What the config says and weights do not: whether it is QuickGELU, and both towers' heads (None for a ResNet).

    Raises UserError for what our towers do not have, and for pictures that are normalised otherwise.
    """
    model, images = settings.get("model_cfg") or {}, settings.get("preprocess_cfg") or {}
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    for tower, has, known in (("vision_cfg", vision, _VISION_KEYS), ("text_cfg", text, _TEXT_KEYS)):
        other = sorted(key for key, value in has.items() if key not in known and value not in _NONE)
        if other:
            raise UserError(f"{tower} has '{other[0]}', which our towers do not have")
    for key, ours in (("mean", IMAGE_MEAN), ("std", IMAGE_STD)):
        theirs = images.get(key)
        if theirs is not None and any(abs(a - b) > 1e-6 for a, b in zip(theirs, ours, strict=True)):
            raise UserError(f"pictures are normalised with {key} {theirs}, not {list(ours)}")
    resnet = not isinstance(vision.get("layers", 12), int)
    image_heads = None if resnet else vision.get("width", 768) // vision.get("head_width", _HEAD_WIDTH)
    return bool(model.get("quick_gelu", False)), (image_heads, text.get("heads", 8))


def write_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the content of the model's open_clip_config.json."""
    vision, text = config.vision, config.text
    image: dict[str, Any] = {"image_size": vision.image_size, "width": vision.width, "patch_size": None}
    if isinstance(vision, VisionConfig):
        image |= {"layers": vision.layers, "patch_size": vision.patch_size, "head_width": vision.width // vision.heads}
        hidden = round(vision.width * vision.mlp_ratio)
        if hidden != 4 * vision.width:
            image["mlp_ratio"] = (hidden + 0.5) / vision.width  # it cuts the product off, where we round it
    else:
        image["layers"] = list(vision.layers)
    keys = ("context_length", "vocab_size", "width", "heads", "layers")
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "vision_cfg": image,
        "text_cfg": {key: getattr(text, key) for key in keys},
    }
    if config.init_logit_bias is not None:
        model["init_logit_bias"] = config.init_logit_bias
    images = {"mean": list(IMAGE_MEAN), "std": list(IMAGE_STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model, "preprocess_cfg": images}
