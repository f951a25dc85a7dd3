"""What model a state dict is of, told by its names and shapes; and weights made to fit another size of its inputs.

Shape suffixes: P places of a grid, row by row; W width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.config import ModelConfig, ResNetConfig, TextConfig, VisionConfig
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.models.presets import PRESETS

Tensors = dict[str, Tensor]

_HEAD_WIDTH = 64
_RESNET_STRIDE = 32
_GRIDS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
_FREE = ("vision.image_size", "vision.patch_dropout", "text.context_length", "init_logit_scale", "init_logit_bias")
"""What may differ between weights and the model that starts from them."""


def infer(
    tensors: Tensors,
    quick_gelu: bool | None = None,
    heads: tuple[int | None, int] | None = None,
    like: ModelConfig | None = None,
) -> ModelConfig:
    """The model that these weights are of.

    Args:
        tensors: with the names of CLIP's state dict.
        quick_gelu: which activation; None takes that of `like`, else GELU. It leaves no trace in weights.
        heads: of the image tower (None for a ResNet) and of the text tower. None takes those of `like` or of a preset
            that has these shapes, else one for every 64 channels. They leave no trace either.
        like: a model to go by where it has these shapes.

    Raises:
        UserError: these are not the weights of a CLIP.
    """
    try:
        resnet = "visual.layer1.0.conv1.weight" in tensors
        vision = _resnet(tensors) if resnet else _vit(tensors)
        context_length, width = tensors["positional_embedding"].shape
        text = TextConfig(
            context_length=context_length,
            vocab_size=len(tensors["token_embedding.weight"]),
            width=width,
            layers=_count(tensors, "transformer.resblocks."),
            heads=1,
        )
        bias = float(tensors["logit_bias"]) if "logit_bias" in tensors else None
        embed_dim = tensors["text_projection"].shape[1]
        config = ModelConfig(embed_dim=embed_dim, vision=vision, text=text, init_logit_bias=bias)
    except (KeyError, ValueError, IndexError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else "shapes do not fit each other"
        raise UserError(f"these are not the weights of a CLIP: {missing}") from None
    known = [other for other in ([like] if like else []) + list(PRESETS.values()) if _shapes(other) == _shapes(config)]
    heads = heads or _heads(known[0] if known else None, config)
    if quick_gelu is None:
        quick_gelu = like is not None and like in known and like.quick_gelu
    return _with_heads(config, *heads).model_copy(update={"quick_gelu": quick_gelu})


def check_fit(config: ModelConfig, tensors: Tensors) -> None:
    """Raise UserError, in one line, where these are not the tensors of that model."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in CLIP(config).state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            if not name.endswith("num_batches_tracked"):  # which old files do without
                raise UserError(f"{name} is missing")
        elif tensors[name].shape != shape:
            raise UserError(f"{name} is {list(tensors[name].shape)} where the model has {list(shape)}")
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise UserError(f"the model has no {unknown[0]}")


def fit(tensors: Tensors, config: ModelConfig, wanted: ModelConfig) -> Tensors:
    """The weights of `config` as `wanted` can start from them: another picture size, a shorter context, or the same.

    Position embeddings of a grid are interpolated (bicubic, antialiased), those of captions are cut. A logit bias
    begins as `wanted` has it where the weights have none, and is left out where `wanted` has none.

    Raises:
        UserError: it is another model; names the first difference.
    """
    _check_same(_flat(config), _flat(wanted))
    tensors = dict(tensors)
    for name in _GRIDS:
        if name in tensors:
            tensors[name] = _resize(tensors[name], _grid(wanted))
    tensors["positional_embedding"] = tensors["positional_embedding"][: wanted.text.context_length]
    if wanted.init_logit_bias is None:
        tensors.pop("logit_bias", None)
    else:
        tensors.setdefault("logit_bias", torch.tensor(wanted.init_logit_bias))
    return tensors


def _check_same(has: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in sorted(has.keys() | wanted.keys()):
        if key not in _FREE and has.get(key) != wanted.get(key):
            raise UserError(f"the weights are of another model: their {key} is {has.get(key)}, not {wanted.get(key)}")
    longest, asked = has["text.context_length"], wanted["text.context_length"]
    if asked > longest:
        raise UserError(f"the weights know captions of at most {longest} tokens: text.context_length {asked} is longer")


def _flat(config: ModelConfig) -> dict[str, Any]:
    content = config.model_dump()
    flat = {f"{tower}.{key}": value for tower in ("vision", "text") for key, value in content.pop(tower).items()}
    return flat | content


def _grid(config: ModelConfig) -> int:
    vision = config.vision
    return vision.image_size // (vision.patch_size if isinstance(vision, VisionConfig) else _RESNET_STRIDE)


def _resize(positions: Tensor, grid: int) -> Tensor:
    """[1 + P, W], the first row being of the whole picture, -> [1 + grid^2, W]"""
    first, rest_PW = positions[:1], positions[1:]
    side = math.isqrt(len(rest_PW))
    if side == grid:
        return positions
    image = rest_PW.T.reshape(1, -1, side, side)
    resized = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, resized[0].flatten(1).T])


def _vit(tensors: Tensors) -> VisionConfig:
    width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    hidden = len(tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"])
    return VisionConfig(
        image_size=_side(tensors[_GRIDS[0]]) * patch_size,
        patch_size=patch_size,
        width=width,
        layers=_count(tensors, "visual.transformer.resblocks."),
        heads=1,
        mlp_ratio=round(hidden / width, 4),
    )


def _resnet(tensors: Tensors) -> ResNetConfig:
    first, second, third, fourth = (_count(tensors, f"visual.layer{stage}.") for stage in range(1, 5))
    return ResNetConfig(
        image_size=_side(tensors[_GRIDS[1]]) * _RESNET_STRIDE,
        width=len(tensors["visual.layer1.0.conv1.weight"]),
        layers=(first, second, third, fourth),
    )


def _side(positions: Tensor) -> int:
    side = math.isqrt(len(positions) - 1)
    if side * side + 1 != len(positions):
        raise ValueError("the grid is not square")
    return side


def _count(tensors: Tensors, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _shapes(config: ModelConfig) -> ModelConfig:
    """Without what leaves no trace in the weights."""
    plain: dict[str, Any] = {"quick_gelu": False, "init_logit_scale": 0.0, "init_logit_bias": None}
    if isinstance(config.vision, VisionConfig):
        plain["vision"] = config.vision.model_copy(update={"patch_dropout": 0.0})
    return _with_heads(config.model_copy(update=plain), 1, 1)


def _with_heads(config: ModelConfig, image_heads: int | None, text_heads: int) -> ModelConfig:
    update: dict[str, Any] = {"text": config.text.model_copy(update={"heads": text_heads})}
    if isinstance(config.vision, VisionConfig):
        update["vision"] = config.vision.model_copy(update={"heads": image_heads})
    return config.model_copy(update=update)


def _heads(known: ModelConfig | None, config: ModelConfig) -> tuple[int | None, int]:
    if known is None:
        vision = config.vision
        image = max(1, vision.width // _HEAD_WIDTH) if isinstance(vision, VisionConfig) else None
        return image, max(1, config.text.width // _HEAD_WIDTH)
    return known.vision.heads if isinstance(known.vision, VisionConfig) else None, known.text.heads
