"""Pictures of characters with their Unicode names as captions: a data set that needs no network and no files.

    from rayclip.config import GlyphsConfig
    from rayclip.data.samples import glyphs

    config = GlyphsConfig()
    items = glyphs.build("train", config)              # a list of small picklable items, in a fixed order
    picture, caption, cls = glyphs.render(items[0], config.size)   # PIL RGB [size, size], str, None
    items = glyphs.build("held_out_font", config)      # or another of SPLITS: cls is an index into
    names = glyphs.class_names("held_out_font")        # these names

`train` shows every usable character in every training face. `held_out_font` asks for letters in a typeface that
training never shows; `known_font` for the same letters in a typeface that it does show, drawn anew;
`unseen_combinations` for letters with marks that training never shows together. A picture is a
function of (seed, split, index) and of nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from rayclip.config import GlyphsConfig
from rayclip.data.order import uniform
from rayclip.data.samples import fonts
from rayclip.errors import UserError, nearest

SPLITS = ("train", "held_out_font", "unseen_combinations", "known_font")

PALETTE: dict[str, tuple[int, int, int]] = {
    "black": (16, 16, 16),
    "white": (246, 246, 246),
    "gray": (128, 128, 128),
    "red": (205, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (250, 215, 40),
    "green": (30, 140, 55),
    "blue": (35, 80, 205),
    "purple": (125, 40, 155),
    "pink": (250, 150, 190),
    "brown": (120, 70, 30),
}
TEMPLATES = ("the character {}", "a picture of {}", "a glyph: {}", "one {}", "the symbol {}")
_STYLE_WORDS = frozenset(
    ("bold", "italic", "script", "fraktur", "sans-serif", "monospace", "double-struck", "heavy", "light")
)

_SUPERSAMPLE = 4
_LEAST_CONTRAST = 4.0
_MARGIN = 0.05  # of the picture's side, on each side: what a crop of 0.9 of the area may take away
_BASELINE = 0.72  # of the side, from above: leaves room for two marks over a capital
_NUM_DRAWS = 16


@dataclass(frozen=True, slots=True)
class Item:
    """One picture to draw. `cls` is the class's index in an evaluation split, None in training."""

    split: str
    index: int
    face: str
    char: str
    cls: int | None
    plain_share: float
    print_share: float
    seed: int


def build(split: str, config: GlyphsConfig) -> list[Item]:
    """Every item of a split, in a fixed order. Raises UserError for a split that there is not."""
    if split == "train":
        return _train_items(config)
    cls = {char: index for index, char in enumerate(_class_chars(split))}
    faces = {"held_out_font": fonts.HELD_OUT_FACES, "known_font": fonts.KNOWN_FACES}.get(split, fonts.TRAIN_FACES)
    pairs = [(face, char) for face in faces for char in fonts.characters(face) if char in cls]
    pairs = [pair for pair in pairs for _ in range(config.eval_renders)]
    return [
        Item(split, i, face, char, cls[char], 1.0, config.print_share, config.seed)
        for i, (face, char) in enumerate(pairs)
    ]


def class_names(split: str) -> list[str]:
    """The classes of an evaluation split, in order of their index. Raises UserError for any other split."""
    return [fonts.name_of(char) for char in _class_chars(split)]


@cache
def _class_chars(split: str) -> tuple[str, ...]:
    if split == "unseen_combinations":
        return fonts.unseen_combinations()
    if split not in ("held_out_font", "known_font"):
        raise UserError(f"no classes for split '{split}' of the glyphs: {nearest(split, list(SPLITS))}")
    seen = fonts.train_characters() - set(fonts.unseen_combinations())
    held_out = {char for face in fonts.HELD_OUT_FACES for char in fonts.characters(face)}
    return tuple(sorted(char for char in held_out & seen if fonts.is_letter(char)))


def _train_items(config: GlyphsConfig) -> list[Item]:
    unseen = set(fonts.unseen_combinations())
    pairs = [(face, char) for face in fonts.TRAIN_FACES for char in fonts.characters(face) if char not in unseen]
    renders = {True: config.letter_renders, False: config.symbol_renders}
    repeated = [pair for pair in pairs for _ in range(renders[fonts.is_letter(pair[1])])]
    return [
        Item("train", i, face, char, None, config.plain_share, config.print_share, config.seed)
        for i, (face, char) in enumerate(repeated)
    ]


def render(item: Item, size: int) -> tuple[Image.Image, str, int | None]:
    """Draw one item: an RGB picture [size, size], its caption, and its class where it has one."""
    draw = _draws(item)
    ink, ground = _colours(draw, item.print_share)
    mask = _mask(item.face, item.char, size, draw)
    paper = _paper(item, size, PALETTE[ground], draw)
    colour = np.clip(np.array(PALETTE[ink]) + [20 * draw() - 10 for _ in range(3)], 0, 255)
    alpha = mask[:, :, None]
    pixels = np.clip(paper * (1 - alpha) + colour * alpha + 0.5, 0, 255).astype(np.uint8)
    caption = _caption(item, ink, ground, draw)
    return Image.fromarray(pixels), caption, item.cls


def _draws(item: Item) -> Callable[[], float]:
    """The item's own numbers in [0, 1), one a call, always in the same order."""
    numbers = uniform(item.seed, SPLITS.index(item.split), item.index, np.arange(_NUM_DRAWS))
    return iter(numbers.tolist()).__next__


def _colours(draw: Callable[[], float], print_share: float) -> tuple[str, str]:
    """Names of ink and ground: a share black on white as in print, the others any pair that can be read."""
    kind, pick = draw(), draw()
    if kind < print_share:
        return "black", "white"
    pairs = _readable_pairs()
    return pairs[int(pick * len(pairs))]


@cache
def _readable_pairs() -> list[tuple[str, str]]:
    names = list(PALETTE)
    return [(a, b) for a in names for b in names if _contrast(PALETTE[a], PALETTE[b]) >= _LEAST_CONTRAST]


def _contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """The contrast ratio of WCAG 2, from 1 to 21."""
    dark, light = sorted((_luminance(a), _luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: tuple[int, int, int]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _mask(face: str, char: str, size: int, draw: Callable[[], float]) -> np.ndarray:
    """How much of each pixel the ink covers, float32 [size, size] in [0, 1].

    Every character stands on one baseline at about one size to the em, so that case and height can be seen; only a
    glyph that would not fit is shrunk, or moved up or down.
    """
    side = size * _SUPERSAMPLE
    low, high = _MARGIN * side, (1 - _MARGIN) * side
    left, top, right, bottom = fonts.ink_box(face, char)
    em = int(min((0.66 + 0.06 * draw()) * side, (high - low) / max(right - left, bottom - top)))
    wander = 0.03 * side
    x = side / 2 - (left + right) / 2 * em + (2 * draw() - 1) * wander
    y = _BASELINE * side + (2 * draw() - 1) * wander
    x = min(max(x, low - left * em), high - right * em)
    y = min(max(y, low - top * em), high - bottom * em)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text((round(x), round(y)), char, fill=255, font=fonts.load_font(face, em), anchor="ls")
    return np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float32) / 255


def _paper(item: Item, size: int, colour: tuple[int, int, int], draw: Callable[[], float]) -> np.ndarray:
    """The ground, float32 [size, size, 3]: plain, with a slight slope of light, or with a slight grain."""
    kind, slope_x, slope_y, tint = draw(), 2 * draw() - 1, 2 * draw() - 1, 16 * draw() - 8
    paper = np.empty((size, size, 3), np.float32)
    paper[:] = np.array(colour, np.float32) + np.float32(tint)
    if kind >= 0.5:
        ramp = np.linspace(-16, 16, size, dtype=np.float32)
        paper += (slope_x * ramp[None, :] + slope_y * ramp[:, None])[:, :, None]
    if kind >= 0.75:
        noise = uniform(item.seed, SPLITS.index(item.split), item.index, _NUM_DRAWS + np.arange(size * size))
        paper += (20 * noise - 10).astype(np.float32).reshape(size, size, 1)
    return paper


def _caption(item: Item, ink: str, ground: str, draw: Callable[[], float]) -> str:
    """The bare name in a share of the captions; else a template, or what is true of colour and style."""
    name, kind, pick = fonts.name_of(item.char), draw(), draw()
    if kind < item.plain_share:
        return name
    style = fonts.TRAIN_FACES[item.face].style
    words = set(name.split())
    on_ground = f"{name} on {_a(ground)} background"
    choices = [TEMPLATES[int(pick * len(TEMPLATES))].format(name), on_ground]
    # "white chess knight" may be drawn in red and "bold capital a" in any face: such names are left as they are.
    if not words & set(PALETTE):
        choices += [f"{_a(ink)} {name}", f"{ink} {name} on {ground}"]
    if not words & _STYLE_WORDS:
        choices += [f"{style} {name}", f"{name} in {style}"]
    return choices[int((kind - item.plain_share) / (1 - item.plain_share) * len(choices))]


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
