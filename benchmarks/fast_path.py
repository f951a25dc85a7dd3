"""What the fast way from a JPEG to a crop changes: pixel by pixel, and in what a training run comes to.

Beside it stands the slow way of others: PIL decodes the whole picture, and its bicubic takes the crop's box as it is.
The runs are the same but for that: pictures eight times larger than the model's crop, so that the fast way decodes them
at a fourth of their size; the same seeds, hence the same weights to begin with, samples, order and boxes.
"""

import string
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats

from benchmarks.config import BenchmarkConfig
from benchmarks.workload import jpegs
from rayclip.config import GlyphsConfig, IngestConfig, ModelConfig, OptimizerConfig, ZeroShotTask
from rayclip.data.decode import Box, crop_image, open_image, random_box, to_rgb
from rayclip.data.encode import to_sample
from rayclip.data.formats.tar import Sample, write_shard
from rayclip.data.manifest import Manifest
from rayclip.data.samples import fonts, glyphs
from rayclip.data.sources import Record
from rayclip.data.stream import Stream, StreamSpec
from rayclip.data.tokenizer import get_tokenizer
from rayclip.evaluation.tasks import Evaluator
from rayclip.inference.encoder import Encoder
from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import RunState
from rayclip.training.loop import Hooks, LoopPlan, Trainer
from rayclip.training.optimizer import build_optimizer

_PICTURES = 48
_CROPS = ((600, 224), (600, 64), (256, 224), (256, 32))
"""(side of the picture, side of the crop)"""
_SCALE, _RATIO = (0.9, 1.0), (3 / 4, 4 / 3)

_SIDE = 256
_MODEL = ModelConfig.model_validate(
    {
        "embed_dim": 96,
        "vision": {"image_size": 32, "patch_size": 8, "width": 96, "layers": 3, "heads": 3},
        "text": {"context_length": 16, "width": 96, "layers": 2, "heads": 3},
    }
)
_OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_samples=2_000)
_BATCH = 64
_GLYPHS = GlyphsConfig(size=_SIDE)
_FACES = {"train": (fonts.TRAIN_FACES, 3), "held_out_font": (fonts.HELD_OUT_FACES, 4)}
"""Typefaces of a split, and how often each draws each letter."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Differences of pixels in levels of 255; top-1 on a typeface held out, both ways, for each of `repeats` seeds."""
    report: dict[str, Any] = {"pixels": {f"{side} to {size} px": _pixels(side, size) for side, size in _CROPS}}
    with tempfile.TemporaryDirectory() as folder:
        train, test = (_letters(Path(folder), split) for split in ("train", "held_out_font"))
        report |= {"training_pictures": train.total_samples, "test_pictures": test.total_samples}
        report |= _compare(train, test, config)
    return report


def reference_crop(data: bytes, choose_box: Callable[[int, int], Box], size: int) -> np.ndarray:
    """`crop_image` by PIL alone, from the whole picture."""
    image = to_rgb(open_image(data))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=choose_box(*image.size)))


class ReferenceStream(Stream):
    """The stream with every picture cropped the slow way."""

    def crop(self, data: bytes, choose_box: Callable[[int, int], Box]) -> np.ndarray:
        """As `Stream.crop`."""
        return reference_crop(data, choose_box, self.spec.image_size)


def _pixels(side: int, size: int) -> dict[str, float]:
    differences = []
    for data, draws in zip(jpegs(side, _PICTURES), np.random.default_rng(0).random((_PICTURES, 4)), strict=True):
        box = random_box(side, side, _SCALE, _RATIO, draws)
        fast, slow = (crop(data, lambda *_, box=box: box, size) for crop in (crop_image, reference_crop))
        differences.append(np.abs(fast.astype(int) - slow))
    return {
        "mean": round(float(np.mean(differences)), 3),
        "p99": float(np.percentile(differences, 99)),
        "max": float(np.max(differences)),
    }


def _letters(folder: Path, split: str) -> Manifest:
    """The 52 letters of English as large JPEGs, in the faces of training or in those that are held out."""
    place, names = folder / split, [fonts.name_of(char) for char in string.ascii_letters]
    place.mkdir()
    (place / "classnames.txt").write_text("\n".join(names) + "\n")
    faces, renders = _FACES[split]
    pairs = [(face, cls) for face in faces for cls in range(len(names)) for _ in range(renders)]
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()  # a chunk has of every face
    with (place / "000000.tar").open("wb") as target:
        spans = write_shard(target, (_sample(split, number, *pairs[at]) for number, at in enumerate(order)), _BATCH)
    manifest = Manifest.from_spans(place, [("000000.tar", (place / "000000.tar").stat().st_size, spans)])
    manifest.save()
    return manifest


def _sample(split: str, number: int, face: str, cls: int) -> Sample:
    item = glyphs.Item(split, number, face, string.ascii_letters[cls], cls, 1.0, _GLYPHS.print_share, _GLYPHS.seed)
    settings = IngestConfig(source=_GLYPHS, output="", image_format="jpg")
    return to_sample(Record(*glyphs.render(item, _SIDE)), f"{number:06}", settings)


def _compare(train: Manifest, test: Manifest, config: BenchmarkConfig) -> dict[str, Any]:
    task = ZeroShotTask(path=test.folder, templates=("{}",))
    evaluator = Evaluator({"letters": task}, _MODEL.vision.image_size, 256)
    rows: list[tuple[float, float]] = []
    for seed in range(config.repeats):
        spec = _spec(train, seed, config.samples)
        fast, slow = (100 * _top1(stream, evaluator, seed) for stream in (Stream(spec), ReferenceStream(spec)))
        rows.append((fast, slow))
        print(f"seed {seed}: top-1 {fast:.1f}% fast, {slow:.1f}% slow", file=sys.stderr, flush=True)
    fast_top1, slow_top1 = zip(*rows, strict=True)
    return {
        "samples_seen": Stream(spec).num_remaining(),
        "fast_top1": [round(value, 1) for value in fast_top1],
        "reference_top1": [round(value, 1) for value in slow_top1],
        "mean_fast_top1": round(float(np.mean(fast_top1)), 2),
        "mean_reference_top1": round(float(np.mean(slow_top1)), 2),
        "mean_difference": round(float(np.mean(np.subtract(fast_top1, slow_top1))), 2),
        "difference_95": _interval(np.subtract(fast_top1, slow_top1)),
    }


def _interval(differences: np.ndarray) -> list[float] | None:
    """Student's interval of the paired differences' mean; None for one pair."""
    if len(differences) < 2:
        return None
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return [round(float(differences.mean() + side * half), 2) for side in (-1, 1)]


def _spec(train: Manifest, seed: int, samples: int) -> StreamSpec:
    return StreamSpec(
        folder=train.folder, digest=train.digest, seed=seed, end=Stream.position_at(train, seed, samples), window=8,
        image_size=_MODEL.vision.image_size, context_length=_MODEL.text.context_length, crop_scale=_SCALE,
        crop_ratio=(0.95, 1.05),
    )  # fmt: skip


def _top1(stream: Stream, evaluator: Evaluator, seed: int) -> float:
    torch.manual_seed(seed)
    model = CLIP(_MODEL)
    total = stream.num_remaining()
    plan = LoopPlan(
        _OPTIMIZER, total, log_every=total, checkpoint_every=total, evaluate_every=None, max_bad_fraction=0.0
    )
    hooks = Hooks(_nothing, _nothing, dict, _nothing)
    trainer = Trainer(plan, model, build_optimizer(model, _OPTIMIZER), RunState(), stream.ledger(), hooks)
    trainer.run(stream.batches(_BATCH))
    encoder = Encoder(model, get_tokenizer(_MODEL.text.context_length), "cpu")
    return float(evaluator.run(encoder)["letters"]["top1"])


def _nothing(*_: object) -> None:
    pass
