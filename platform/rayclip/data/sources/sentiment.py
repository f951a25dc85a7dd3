"""Source `sentiment`: sentences that praise or blame, drawn as text: what a picture says must be read (the idea of the
paper's rendered SST2). The sentences are made of the words here.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from rayclip.config import SentimentConfig
from rayclip.data.order import uniform
from rayclip.data.samples.fonts import TRAIN_FACES, load_font
from rayclip.data.sources.base import Record, Split

CLASS_NAMES = ("negative", "positive")
SPLITS = ("train", "test")

_SUBJECTS = ("the film", "this story", "the music", "her novel", "the meal", "that evening", "the play", "his speech")
_VERBS = ("was", "felt", "seemed", "turned out", "proved", "remained")
_ENDINGS = ("", "from start to end", "in every way", "for all of us", "once again", "to my surprise", "without a doubt")
_ADJECTIVES = {
    "train": (
        ("dull", "awful", "boring", "clumsy", "terrible", "pointless", "weak", "annoying", "tasteless", "sad and flat"),
        ("great", "lovely", "exciting", "clever", "wonderful", "moving", "strong", "charming", "delicious", "warm"),
    ),
    "test": (
        ("dreadful", "tedious", "ugly", "a waste of time", "disappointing"),
        ("brilliant", "gripping", "beautiful", "a true joy", "delightful"),
    ),
}
_MARGIN = 0.06  # of the side
_LINE = 1.3  # of the font's size


class Item(NamedTuple):
    """One sentence and the face that it is drawn in."""

    sentence: str
    face: str
    cls: int


def splits(config: SentimentConfig, cache: Path) -> dict[str, Split]:
    """`train` and `test`, both with classes, half of each kind."""
    counts = {"train": config.train, "test": config.test}
    return {
        name: Split([_item(config.seed, name, index) for index in range(count)], CLASS_NAMES)
        for name, count in counts.items()
    }


def read(item: Item, config: SentimentConfig) -> Record:
    """Black on white, as large as fits."""
    side = config.size
    image = Image.new("RGB", (side, side), "white")
    pixels, text = _fit(item, side)
    spacing = round((_LINE - 1) * pixels)
    draw = ImageDraw.Draw(image)
    draw.multiline_text(
        (side / 2, side / 2), text, fill="black", font=load_font(item.face, pixels), anchor="mm", spacing=spacing
    )
    return Record(image, CLASS_NAMES[item.cls], item.cls)


def _item(seed: int, split: str, index: int) -> Item:
    cls = index % 2
    draws = iter(uniform(seed, SPLITS.index(split), index, np.arange(5)).tolist())
    words = [
        choices[int(next(draws) * len(choices))]
        for choices in (_SUBJECTS, _VERBS, _ADJECTIVES[split][cls], _ENDINGS, tuple(TRAIN_FACES))
    ]
    sentence = " ".join(filter(None, words[:4]))
    return Item(f"{sentence[0].upper()}{sentence[1:]}.", words[4], cls)


def _fit(item: Item, side: int) -> tuple[int, str]:
    """The largest size at which the sentence fits, and its lines."""
    room = side * (1 - 2 * _MARGIN)
    for pixels in range(side // 5, 5, -1):
        lines = _wrap(item, pixels, room)
        if lines and len(lines) * _LINE * pixels <= room:
            return pixels, "\n".join(lines)
    return 5, item.sentence


def _wrap(item: Item, pixels: int, room: float) -> list[str]:
    """Lines that are not wider than the room; none where a word is."""
    font, lines = load_font(item.face, pixels), [""]
    for word in item.sentence.split():
        if font.getlength(word) > room:
            return []
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= room else [lines[-1], word]
    return lines
