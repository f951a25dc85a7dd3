"""Hugging Face's CLIPModel: the names of its weights and its config.json, both ways.

It keeps queries, keys and values apart, and projections transposed. It has no ResNet.
"""

from typing import Any

import torch
from torch import Tensor

from rayclip.config import ModelConfig, VisionConfig
from rayclip.errors import UserError

Tensors = dict[str, Tensor]

_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_PLAIN = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelt so
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_PARTS = ("weight", "bias")


def is_huggingface(tensors: Tensors) -> bool:
    """Whether weights have CLIPModel's names."""
    return any(name.startswith(("text_model.", "vision_model.")) for name in tensors)


def from_huggingface(tensors: Tensors) -> Tensors:
    """CLIPModel's weights with our names. Raises UserError where one is missing or there is one too many."""
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    ours: Tensors = {}
    try:
        for name, theirs in _names(_num_blocks(left)).items():
            ours[name] = left.pop(theirs)
        for name, theirs in _TRANSPOSED.items():
            ours[name] = left.pop(theirs).T.contiguous()
        for name, parts in _attention_names(_num_blocks(tensors)).items():
            ours[name] = torch.cat([left.pop(part) for part in parts])
    except KeyError as error:
        raise UserError(f"these are not the weights of a CLIPModel: {error} is missing") from None
    if left:
        raise UserError(f"these are not the weights of a CLIPModel: it has no {min(left)}")
    return ours


def to_huggingface(tensors: Tensors) -> Tensors:
    """Our weights with CLIPModel's names."""
    counts = _num_blocks(tensors)
    theirs = {name: tensors[ours] for ours, name in _names(counts).items()}
    theirs |= {name: tensors[ours].T.contiguous() for ours, name in _TRANSPOSED.items()}
    for ours, parts in _attention_names(counts).items():
        theirs |= {name: part.clone() for name, part in zip(parts, tensors[ours].chunk(3), strict=True)}
    return theirs


def read_settings(settings: dict[str, Any]) -> tuple[bool, tuple[int, int]]:
    """What CLIPModel's config.json says and weights do not: whether it is QuickGELU, and both towers' heads.

    Raises UserError for what our towers do not have.
    """
    vision, text = (settings.get(f"{tower}_config") or {} for tower in ("vision", "text"))
    for key, default, allowed in (("hidden_act", "quick_gelu", ("quick_gelu", "gelu")), ("layer_norm_eps", 1e-5, None)):
        values = [tower.get(key, default) for tower in (vision, text)]
        if values[0] != values[1] or values[0] not in (allowed or (default,)):
            shown = " or ".join(map(str, allowed or (default,)))
            raise UserError(f"{key} is {values[0]} for pictures and {values[1]} for text: it must be {shown} for both")
    quick_gelu = vision.get("hidden_act", "quick_gelu") == "quick_gelu"
    return quick_gelu, (vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8))


def write_settings(config: ModelConfig) -> dict[str, Any]:
    """CLIPModel's config.json. Raises UserError for a model that it cannot be."""
    vision, text = config.vision, config.text
    if not isinstance(vision, VisionConfig):
        raise UserError("Hugging Face's CLIPModel has no ResNet: export to open_clip")
    if config.init_logit_bias is not None:
        raise UserError("Hugging Face's CLIPModel has no logit bias: export to open_clip")
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    towers: dict[str, dict[str, Any]] = {
        "vision_config": {"image_size": vision.image_size, "patch_size": vision.patch_size},
        "text_config": {
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            # The last two of the vocabulary; text is read at the first end token.
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": 0,
        },
    }
    for name, tower, hidden in (
        ("vision_config", vision, round(vision.width * vision.mlp_ratio)),
        ("text_config", text, 4 * text.width),
    ):
        towers[name] |= {
            "model_type": f"clip_{name.removesuffix('_config')}_model",
            "hidden_size": tower.width,
            "intermediate_size": hidden,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "projection_dim": config.embed_dim,
        }
    names = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": config.embed_dim}
    return names | towers


def _num_blocks(tensors: Tensors) -> dict[str, int]:
    """Blocks of each tower, by our name of the tower, for weights with either names."""
    counts: dict[str, int] = {}
    for ours, theirs in _TOWERS.items():
        for prefix in (f"{ours}.", f"{theirs}."):
            numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
            counts[ours] = max(counts.get(ours, 0), len(numbers))
    return counts


def _names(num_blocks: dict[str, int]) -> dict[str, str]:
    """Ours to theirs, for all that is the same tensor."""
    names = dict(_PLAIN)
    names |= {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in _NORMS.items() for part in _PARTS}
    for tower, count in num_blocks.items():
        for block in range(count):
            for ours, theirs in _BLOCK.items():
                for part in _PARTS:
                    names[f"{tower}.{block}.{ours}.{part}"] = f"{_TOWERS[tower]}.{block}.{theirs}.{part}"
    return names


def _attention_names(num_blocks: dict[str, int]) -> dict[str, list[str]]:
    """Our one tensor of queries, keys and values to their three."""
    return {
        f"{tower}.{block}.attn.in_proj_{part}": [
            f"{_TOWERS[tower]}.{block}.self_attn.{which}_proj.{part}" for which in ("q", "k", "v")
        ]
        for tower, count in num_blocks.items()
        for block in range(count)
        for part in _PARTS
    }
