"""Source `digits`: the handwritten digits that come with scikit-learn, of the UCI collection by Alpaydin and Kaynak."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rayclip.config import DigitsConfig
from rayclip.data.sources.base import Record, Split

CLASS_NAMES = tuple(
    f"digit {word}" for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
)
_ONE_IN = 5  # is held out
_MOST_INK = 16


class Item(NamedTuple):
    """One picture, by its number in scikit-learn's array."""

    number: int
    cls: int


def splits(config: DigitsConfig, cache: Path) -> dict[str, Split]:
    """`train` and `test`, both with classes."""
    items = [Item(index, int(label)) for index, label in enumerate(_digits()[1])]
    parts = {"train": [i for i in items if i.number % _ONE_IN], "test": [i for i in items if not i.number % _ONE_IN]}
    return {name: Split(chosen, CLASS_NAMES) for name, chosen in parts.items()}


def read(item: Item, config: DigitsConfig) -> Record:
    """Dark ink on white, enlarged."""
    paper = 255 - _digits()[0][item.number] * (255 / _MOST_INK)
    image = Image.fromarray(paper.astype(np.uint8)).resize((config.size, config.size), Image.Resampling.BICUBIC)
    return Record(image.convert("RGB"), CLASS_NAMES[item.cls], item.cls)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Ink from 0 to 16, [1797, 8, 8], and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
