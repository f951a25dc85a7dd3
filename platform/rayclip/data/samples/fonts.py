"""The fonts that matplotlib ships, and which characters may be asked of each.

A character is usable in a face when the face's own table has it, its glyph leaves ink, and Unicode gives it a name
that says what is seen: letters, numbers, punctuation and symbols. Controls, spaces, private use and combining marks
on their own are left out.
"""

import re
import unicodedata
from collections import Counter
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont

from rayclip.data.order import mix64


class Face(NamedTuple):
    """One font file and what a caption may truly say of it."""

    file: str
    family: str
    bold: bool
    italic: bool

    @property
    def style(self) -> str:
        """The words of a caption: "bold italic sans-serif"."""
        return " ".join(["bold"] * self.bold + ["italic"] * self.italic + [self.family])


def _faces(family: str, *files: str) -> dict[str, Face]:
    """Regular, bold, italic and bold italic, in this order."""
    styles = [(False, False), (True, False), (False, True), (True, True)]
    return {file: Face(f"{file}.ttf", family, *style) for file, style in zip(files, styles, strict=True)}


TRAIN_FACES: dict[str, Face] = {
    **_faces("sans-serif", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    **_faces(
        "monospace", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"
    ),
    **_faces("serif", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
}
HELD_OUT_FACES: dict[str, Face] = _faces(
    "serif", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"
)
KNOWN_FACES = tuple(face for face in TRAIN_FACES if re.fullmatch("DejaVuSans(-.*)?", face))
"""The held-out family's sister, of the same characters and styles."""
_ALL_FACES = TRAIN_FACES | HELD_OUT_FACES

_COMBINATION = re.compile(r"((?:latin|greek|cyrillic) (?:small|capital) letter [a-z-]+(?: [a-z-]+)*?) with (.+)")
# Held in code, not in a config: every run must hold out the same combinations, or their scores say nothing.
_SPLIT_SEED = 2021
_ONE_IN = 7
_LEAST_MARK_COMBINATIONS = 5


def name_of(char: str) -> str:
    """As in "latin small letter e with acute"; empty for a character without a name."""
    return unicodedata.name(char, "").lower()


def is_letter(char: str) -> bool:
    """Whether the character is a Latin, Greek or Cyrillic letter that stands on the line."""
    return unicodedata.category(char) in ("Lu", "Ll", "Lt", "Lo") and name_of(char).startswith(
        ("latin ", "greek ", "cyrillic ")
    )


@lru_cache(maxsize=1024)
def load_font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A face at `pixels` to the em, laid out by the engine that every Pillow has."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / _ALL_FACES[face].file
    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1 << 16)
def ink_box(face: str, char: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the ink around the pen's start on the baseline, in ems; y grows downwards."""
    left, top, right, bottom = load_font(face, 100).getbbox(char, anchor="ls")
    return left / 100, top / 100, right / 100, bottom / 100


@cache
def characters(face: str) -> tuple[str, ...]:
    """The usable characters of a face, by code point."""
    from matplotlib.ft2font import FT2Font

    font = FT2Font(load_font(face, 100).path)
    chars = (chr(code) for code in sorted(font.get_charmap()))
    return tuple(char for char in chars if _has_plain_name(char) and _has_ink(face, char))


def _has_plain_name(char: str) -> bool:
    return unicodedata.category(char)[0] in "LNPS" and bool(name_of(char))


def _has_ink(face: str, char: str) -> bool:
    left, top, right, bottom = ink_box(face, char)
    return right > left and bottom > top and load_font(face, 24).getmask(char).getbbox() is not None


@cache
def unseen_combinations() -> tuple[str, ...]:
    """Letters with marks that no training picture shows, though each one's letter and marks are seen in others.

    One in seven of the Latin, Greek and Cyrillic combinations by a hash of the code point, less those whose letter is
    not seen without these marks or whose marks are seen in fewer than five other combinations.
    """
    combinations = {char: parts for char in train_characters() if (parts := split_combination(char))}
    drawn = {char for char in combinations if int(mix64(_SPLIT_SEED, ord(char))) % _ONE_IN == 0}
    seen = [parts for char, parts in combinations.items() if char not in drawn]
    marks = Counter(mark for _, seen_marks in seen for mark in seen_marks)
    names = {name_of(char) for char in train_characters()} | {letter for letter, _ in seen}
    return tuple(
        char
        for char in sorted(drawn)
        if combinations[char][0] in names and all(marks[m] >= _LEAST_MARK_COMBINATIONS for m in combinations[char][1])
    )


@cache
def train_characters() -> frozenset[str]:
    """Every character that some training face has, unseen combinations included."""
    return frozenset(char for face in TRAIN_FACES for char in characters(face))


def split_combination(char: str) -> tuple[str, tuple[str, ...]] | None:
    """("latin small letter e", ("circumflex", "acute")), or None for a character that is no letter with marks."""
    match = _COMBINATION.fullmatch(name_of(char))
    return (match[1], tuple(match[2].split(" and "))) if match else None
