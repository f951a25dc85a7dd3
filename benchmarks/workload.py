"""What the servers are asked: pictures, labels and models, the same for all of them."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rayclip.config import ModelConfig
from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import RunState, write_checkpoint

TEMPLATE = "a photo of a {}."
TOP_K = 5
NUM_PICTURES = 64
_NUM_LABELS = 100


def labels() -> list[str]:
    """Class names of two words, all distinct."""
    colours = ("amber", "blue", "coral", "dusty", "emerald", "faded", "golden", "hollow", "ivory", "jade")
    things = ("lantern", "bridge", "teapot", "bicycle", "lighthouse", "violin", "market", "glacier", "puppet", "engine")
    return [f"{colour} {thing}" for colour in colours for thing in things][:_NUM_LABELS]


def jpegs(side: int = 256, count: int = NUM_PICTURES) -> list[bytes]:
    """Pictures with structure of every size, as photographs have, of 15 to 25 KB at a side of 256."""
    return [_encode(_soft_noise(side, seed), "JPEG", quality=90) for seed in range(count)]


def pngs(side: int) -> list[bytes]:
    """Small pictures, as the demo's data set has them."""
    return [_encode(_soft_noise(side, seed), "PNG") for seed in range(NUM_PICTURES)]


def write_bodies(path: Path, pictures: list[bytes]) -> None:
    """A zero-shot request a line, which the service and its peers all take."""
    lines = []
    for picture in pictures:
        image = base64.b64encode(picture).decode()
        lines.append(json.dumps({"image": image, "labels": labels(), "templates": TEMPLATE, "top_k": TOP_K}))
    path.write_text("\n".join(lines) + "\n")


def write_random_checkpoint(folder: Path, config: ModelConfig) -> Path:
    """A checkpoint of a model with random weights: speed does not depend on what they are."""
    torch.manual_seed(0)
    model = CLIP(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    write_checkpoint(folder, model, optimizer, RunState(), {"model": config.model_dump()}, {})
    return folder


def _soft_noise(side: int, seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    total = np.full((side, side, 3), 128.0)
    cells, strength = 2, 40.0
    while cells <= side:
        coarse = generator.normal(scale=strength, size=(cells, cells, 3)).clip(-127, 127)
        small = Image.fromarray((coarse + 128).astype(np.uint8))
        total += np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) - 128
        cells, strength = 2 * cells, 0.7 * strength
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def _encode(image: Image.Image, file_format: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()
