"""Whole training steps (forward, loss, backward, AdamW) beside open_clip's on the same pairs, from the same weights.

Shapes: B pairs; H, W a picture's height and width; C its channels; L columns of the token matrix.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.captions import captions
from benchmarks.config import BenchmarkConfig
from benchmarks.memory import extra_bytes
from benchmarks.peak import peak_flops
from benchmarks.peers import load_open_clip
from benchmarks.timing import paired_times
from rayclip.config import ModelConfig, OptimizerConfig, VisionConfig
from rayclip.data.stream import Batch
from rayclip.models.clip import CLIP, MAX_LOGIT_SCALE
from rayclip.models.presets import preset
from rayclip.models.transformer import compile_blocks
from rayclip.models.vision import IMAGE_MEAN, IMAGE_STD
from rayclip.scaling.flops import training_flops
from rayclip.training.optimizer import build_optimizer
from rayclip.training.precision import in_precision
from rayclip.training.step import train_step

_OPTIMIZER = OptimizerConfig(lr=1e-5)


class Side(Protocol):
    """One of the two that are measured."""

    def __init__(self, config: BenchmarkConfig, weights: dict[str, Tensor] | None = None) -> None: ...

    def step(self) -> float:
        """Train on the next batch and wait for the device. Returns the loss before the update."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Ratios of steps run in turn, and the peak memory of each side in a process of its own.

    `mfu` counts the plain architecture on real tokens, also the part of the last blocks that our model leaves out.
    """
    peak_memory, peer_peak_memory = (extra_bytes(_prepare_memory, side, config) for side in (Ours, OpenClip))
    ours = Ours(config)
    theirs = OpenClip(config, ours.model.state_dict())
    losses: tuple[list[float], list[float]] = ([], [])
    ours_s, theirs_s, ratio = paired_times(
        lambda: losses[0].append(ours.step()), lambda: losses[1].append(theirs.step()), config.repeats
    )
    lengths = np.concatenate([batch["num_tokens"] for batch in ours.batches])
    flops = training_flops(preset(config.preset), len(lengths), lengths.tolist()) / len(ours.batches)
    peak, peak_is = peak_flops(ours.device, config.precision)
    return {
        "preset": config.preset,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
        "precision": config.precision,
        "compile": config.compile,
        "tokens_mean": round(float(lengths.mean()), 1),
        "samples_per_s": round(config.batch_size / ours_s, 2),
        "open_clip_samples_per_s": round(config.batch_size / theirs_s, 2),
        "ratio_vs_open_clip": round(ratio, 3),
        "loss_relative_difference": abs(losses[0][0] / losses[1][0] - 1),
        "loss_relative_difference_last": abs(losses[0][-1] / losses[1][-1] - 1),
        "peak_memory_bytes": peak_memory,
        "open_clip_peak_memory_bytes": peer_peak_memory,
        "mfu": round(flops / ours_s / peak, 4),
        "mfu_peak": peak_is,
    }


class Ours:
    """A step as the training loop makes it."""

    def __init__(self, config: BenchmarkConfig, weights: dict[str, Tensor] | None = None) -> None:
        self.device = _device()
        self.batches = _batches(config)
        torch.manual_seed(0)
        self.model = CLIP(preset(config.preset)).to(self.device)
        if weights is not None:
            self.model.load_state_dict(weights)
        if config.compile:
            compile_blocks(self.model)
        self._net = in_precision(self.model, config.precision)
        self._optimizer = build_optimizer(self.model, _OPTIMIZER)
        self._micro_batch_size = config.micro_batch_size
        self._next = _cycle(self.batches)

    def step(self) -> float:
        """Train on the next batch."""
        result = train_step(
            self._net, self.model, self._optimizer, self._next(), _OPTIMIZER.lr, None,
            micro_batch_size=self._micro_batch_size,
        )  # fmt: skip
        _synchronize(self.device)
        return result.loss


class OpenClip:
    """open_clip's model and loss in its training loop's step, with the optimizer that it would be fastest with."""

    def __init__(self, config: BenchmarkConfig, weights: dict[str, Tensor] | None = None) -> None:
        open_clip = load_open_clip()
        self.device = _device()
        self._autocast = _autocast(config, self.device)
        self._model = _open_clip_model(open_clip, config.preset).to(self.device)
        if weights is not None:
            self._model.load_state_dict(weights)
        self._optimizer = _open_clip_optimizer(self._model)
        self._net = torch.compile(self._model) if config.compile else self._model
        self._loss = open_clip.ClipLoss(cache_labels=True)
        self._micro_batch_size = config.micro_batch_size or config.batch_size
        # What its loader gives: normalised float pictures, and all columns of its tokenizer.
        self._next = _cycle([(_normalised(b["image"]), torch.from_numpy(b["tokens"]).long()) for b in _batches(config)])

    def step(self) -> float:
        """Train on the next batch."""
        image_BCHW, tokens_BL = (tensor.to(self.device, non_blocking=True) for tensor in self._next())
        self._optimizer.zero_grad()
        micro_batches = list(zip(*(t.split(self._micro_batch_size) for t in (image_BCHW, tokens_BL)), strict=True))
        loss = self._accumulate(micro_batches) if len(micro_batches) > 1 else self._whole(image_BCHW, tokens_BL)
        self._optimizer.step()
        with torch.no_grad():
            self._model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        _synchronize(self.device)
        return loss.item()

    def _whole(self, image_BCHW: Tensor, tokens_BL: Tensor) -> Tensor:
        with self._autocast():
            loss: Tensor = self._loss(*self._net(image_BCHW, tokens_BL))
        loss.backward()
        return loss

    def _accumulate(self, micro_batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """What its training loop does for --accum-freq: all features without a graph, then each micro-batch anew among
        the others' features, with a loss on all of them each time."""
        with torch.no_grad(), self._autocast():
            cached = [self._net(*micro_batch)[:2] for micro_batch in micro_batches]
        for number, micro_batch in enumerate(micro_batches):
            with self._autocast():
                *own, logit_scale = self._net(*micro_batch)
                features = [*cached[:number], own, *cached[number + 1 :]]
                loss: Tensor = self._loss(*(torch.cat(side) for side in zip(*features, strict=True)), logit_scale)
            loss.backward()
        return loss


def _batches(config: BenchmarkConfig) -> list[Batch]:
    """As many as there are steps: the lengths vary from one to the next as they do in training."""
    model, size, num = preset(config.preset), config.batch_size, config.repeats + 1
    tokens, num_tokens = captions(size * num, model.text.context_length)
    side, generator = model.vision.image_size, np.random.default_rng(1)
    return [
        {
            "image": generator.integers(0, 256, (size, side, side, 3), dtype=np.uint8),
            "tokens": tokens[start : start + size],
            "num_tokens": num_tokens[start : start + size],
            "position": np.arange(start, start + size),
            "row": np.zeros(size, dtype=np.int32),
            "cause": np.zeros(size, dtype=np.int8),
        }
        for start in range(0, size * num, size)
    ]


def _open_clip_model(open_clip: Any, name: str) -> Any:
    """open_clip's own model of the preset's name, or of its sizes where it has none of that name."""
    listed = re.sub("[/@]", "-", name)
    if listed in open_clip.list_models():
        return open_clip.create_model(listed)
    model: ModelConfig = preset(name)
    vision, text = model.vision, model.text
    assert isinstance(vision, VisionConfig)  # it knows all of our ResNets
    return open_clip.model.CLIP(
        model.embed_dim,
        {"layers": vision.layers, "width": vision.width, "head_width": vision.width // vision.heads,
         "patch_size": vision.patch_size, "image_size": vision.image_size},
        text.model_dump(include={"context_length", "vocab_size", "width", "heads", "layers"}),
        quick_gelu=model.quick_gelu,
    )  # fmt: skip


def _open_clip_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Its training script's groups, fused, which its script leaves out."""
    named = list(model.named_parameters())
    gains = [p for n, p in named if p.ndim < 2 or any(part in n for part in ("bn", "ln", "bias", "logit_scale"))]
    rest = [p for _, p in named if not any(p is gain for gain in gains)]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": _OPTIMIZER.weight_decay}]
    return torch.optim.AdamW(groups, lr=_OPTIMIZER.lr, betas=_OPTIMIZER.betas, eps=_OPTIMIZER.eps, fused=True)


def _normalised(image_BHWC: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(image_BHWC).float() / 255
    return ((pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).permute(0, 3, 1, 2).contiguous()


def _autocast(config: BenchmarkConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if config.precision == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def _cycle(items: Sequence[Any]) -> Callable[[], Any]:
    count = 0

    def following() -> Any:
        nonlocal count
        count += 1
        return items[(count - 1) % len(items)]

    return following


def _prepare_memory(side: type[Side], config: BenchmarkConfig) -> Callable[[], object]:
    """Two steps, the side's making and its batch included; what its imports take is not."""
    load_open_clip()

    def work() -> None:
        measured = side(config.model_copy(update={"repeats": 1}))
        measured.step(), measured.step()

    return work


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
