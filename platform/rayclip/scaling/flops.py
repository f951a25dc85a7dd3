"""What a model costs, counted on the meta device: no weights, no data.

A MAC is one multiplication and addition, two FLOPs. What is counted is the plain architecture: every token through
every block and through a ResNet's attention pool. Ours computes less of the last block and of the pool (one row a
sequence is read of them) and only the real tokens of a caption: `num_tokens` tells the latter, and the former is left
in, so that figures mean the same everywhere. What is counted is remembered: even without weights, making a large model
takes a while.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from rayclip.config import ModelConfig
from rayclip.models.clip import CLIP
from rayclip.models.resnet import AttentionPool, ModifiedResNet
from rayclip.models.transformer import Block, Transformer
from rayclip.models.vision import VisionTransformer

_FLOPS_PER_MAC = 2
_FORWARD_AND_BACKWARD = 3  # backward multiplies twice: for the weights and for what came in
_LAYER_NORM, _BATCH_NORM = 5, 2  # operations an element


@dataclass(frozen=True)
class Cost:
    """Of one forward pass: MACs of its matrix products, and operations of its norms, which are memory-bound."""

    macs: int
    norm_operations: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.norm_operations + other.norm_operations)


def meta_model(config: ModelConfig) -> CLIP:
    """The model without its weights."""
    with torch.device("meta"):
        return CLIP(config)


@lru_cache(maxsize=64)
def num_parameters(config: ModelConfig) -> int:
    """Trained numbers, the logit scale included."""
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


@lru_cache(maxsize=64)
def image_cost(config: ModelConfig) -> Cost:
    """One picture through the image tower."""
    tower = meta_model(config).visual
    return _vit_cost(tower) if isinstance(tower, VisionTransformer) else _resnet_cost(tower)


def text_cost(config: ModelConfig, num_tokens: int | None = None) -> Cost:
    """One caption of so many tokens through the text tower; None is the full context, which padded towers compute."""
    return _text_cost(config, num_tokens or config.text.context_length)


@lru_cache(maxsize=1024)
def _text_cost(config: ModelConfig, tokens: int) -> Cost:
    model = meta_model(config)
    blocks = _blocks_cost(model.transformer, tokens)
    return blocks + _norm_cost(model.ln_final, tokens) + Cost(model.text_projection.numel(), 0)


def forward_gmacs(config: ModelConfig) -> float:
    """10^9 operations of one pair at full context, as open_clip's table counts: MACs, and those of the norms."""
    cost = image_cost(config) + text_cost(config)
    return (cost.macs + cost.norm_operations) / 1e9


def training_flops(config: ModelConfig, num_pairs: int, lengths: Iterable[int] | None = None) -> int:
    """FLOPs of the matrix products of training on so many pairs: three times the forward pass.

    `lengths` are the real tokens of each of their captions; None takes the full context. What is recomputed (activation
    checkpointing, embedding twice) is no use, and not counted.
    """
    image = num_pairs * image_cost(config).macs
    if lengths is None:
        text = num_pairs * text_cost(config).macs
    else:
        count = sorted(lengths)
        cost = {length: text_cost(config, length).macs for length in set(count)}
        text = sum(cost[length] for length in count)
    return _FORWARD_AND_BACKWARD * _FLOPS_PER_MAC * (image + text)


def _vit_cost(tower: VisionTransformer) -> Cost:
    tokens = len(tower.positional_embedding)
    products = Cost((tokens - 1) * tower.conv1.weight.numel() + tower.proj.numel(), 0)
    norms = _norm_cost(tower.ln_pre, tokens) + _norm_cost(tower.ln_post, 1)
    return products + norms + _blocks_cost(tower.transformer, tokens)


def _blocks_cost(transformer: Transformer, tokens: int) -> Cost:
    costs = [_block_cost(block, tokens) for block in transformer.resblocks if isinstance(block, Block)]
    return sum(costs, Cost(0, 0))


def _block_cost(block: Block, tokens: int) -> Cost:
    matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    width = block.attn.heads * block.attn.head_width
    attention = 2 * tokens * tokens * width  # scores of all pairs, masked or not, and their mixing of values
    return Cost(tokens * matrices + attention, 0) + _norm_cost(block.ln_1, tokens) + _norm_cost(block.ln_2, tokens)


def _norm_cost(norm: nn.LayerNorm, tokens: int) -> Cost:
    return Cost(0, _LAYER_NORM * tokens * norm.weight.numel())


def _resnet_cost(tower: ModifiedResNet) -> Cost:
    """Convolutions and batch norms as a picture passes them on the meta device; the pool by its shapes."""
    costs = [_pool_cost(tower.attnpool)]

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            costs.append(Cost(output[0, 0].numel() * module.weight.numel(), 0))
        else:
            costs.append(Cost(0, _BATCH_NORM * output.numel()))

    for module in tower.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(count)
    side = tower.image_size
    with torch.no_grad():
        tower.eval()(torch.empty(1, side, side, 3, device="meta"))
    return sum(costs, Cost(0, 0))


def _pool_cost(pool: AttentionPool) -> Cost:
    tokens, width = pool.positional_embedding.shape
    per_token = sum(p.numel() for name, p in pool.named_parameters() if name.endswith("proj.weight"))
    return Cost(tokens * per_token + 2 * tokens * tokens * width, 0)
