"""Source `shapes`: pictures of three to ten shapes that do not touch, to be counted (the idea of CLEVR counts)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from rayclip.config import ShapesConfig
from rayclip.data.order import uniform
from rayclip.data.samples.glyphs import PALETTE
from rayclip.data.sources.base import Record, Split

LEAST = 3
_WORDS = ("three", "four", "five", "six", "seven", "eight", "nine", "ten")
CLASS_NAMES = tuple(f"{word} shapes" for word in _WORDS)
SPLITS = ("train", "test")

_GROUNDS = ("white", "black", "gray")
_CORNERS = (0, 3, 4, 6)  # 0 is a circle
_CELLS = 4  # a side: each shape is somewhere in a cell of its own
_SUPERSAMPLE = 3
_DRAWS_A_SHAPE = 6


class Item(NamedTuple):
    """One picture to draw."""

    split: str
    number: int
    cls: int


def splits(config: ShapesConfig, cache: Path) -> dict[str, Split]:
    """`train` and `test`, both with classes, as many of each number."""
    counts = {"train": config.train, "test": config.test}
    return {
        name: Split([Item(name, number, number % len(CLASS_NAMES)) for number in range(count)], CLASS_NAMES)
        for name, count in counts.items()
    }


def read(item: Item, config: ShapesConfig) -> Record:
    """Draw the picture of an item."""
    num_shapes = item.cls + LEAST
    key = config.seed, SPLITS.index(item.split), item.number
    cells = uniform(*key, 0, np.arange(_CELLS**2)).argsort()[:num_shapes].tolist()
    draws = uniform(*key, 1, np.arange(1 + _DRAWS_A_SHAPE * num_shapes)).tolist()
    ground = _GROUNDS[int(draws[0] * len(_GROUNDS))]
    inks = [colour for name, colour in PALETTE.items() if name != ground]
    side = config.size * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), PALETTE[ground])
    draw = ImageDraw.Draw(image)
    for number, cell in enumerate(cells):
        mine = draws[1 + number * _DRAWS_A_SHAPE : 1 + (number + 1) * _DRAWS_A_SHAPE]
        _draw_shape(draw, side / _CELLS, divmod(cell, _CELLS), mine, inks)
    return Record(image.reduce(_SUPERSAMPLE), CLASS_NAMES[item.cls], item.cls)


def _draw_shape(
    draw: ImageDraw.ImageDraw, cell: float, place: tuple[int, int], draws: list[float], inks: list[tuple[int, int, int]]
) -> None:
    kind, ink, size, turn, right, down = draws
    radius = cell * (0.22 + 0.2 * size)
    room = cell - 2.2 * radius  # a little between neighbours
    x = place[1] * cell + cell / 2 + room * (right - 0.5)
    y = place[0] * cell + cell / 2 + room * (down - 0.5)
    colour, corners = inks[int(ink * len(inks))], _CORNERS[int(kind * len(_CORNERS))]
    if corners:
        draw.regular_polygon((x, y, radius), corners, rotation=360 * turn, fill=colour)
    else:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
