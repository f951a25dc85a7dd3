"""A contact sheet of zero-shot answers: one PNG in which people see what a model gets right and what it confuses.

Shapes: N pictures, K best classes.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rayclip.errors import UserError
from rayclip.io.files import whole_file

# The parts of a sheet, in pixels.
_PICTURE = 216
_PADDING = 12
_EDGE = 4
_GAP = 16
_MARGIN = 24
_TITLE_LINE = 26
_NAME_LINE = 20
_NAME_SPACE = 2 * _NAME_LINE + 8
_ANSWER_LINE = 24
_NUM_ANSWERS = 3
_CELL_WIDTH = _PICTURE + 2 * _PADDING
_CELL_HEIGHT = _PICTURE + 3 * _PADDING + _NAME_SPACE + _NUM_ANSWERS * _ANSWER_LINE

_INK, _FAINT, _PAPER, _CELL = "#1f2328", "#656d76", "#f6f8fa", "#ffffff"
# Edge and bar of a right and of a wrong answer; a mark says the same to those who cannot tell the colours apart.
_RIGHT, _RIGHT_BAR = "#1a7f37", "#aceebb"
_WRONG, _WRONG_BAR = "#cf222e", "#e4e8ec"


def write_contact_sheet(
    path: str | Path,
    images: np.ndarray,
    labels: np.ndarray,
    top_classes: np.ndarray,
    top_probabilities: np.ndarray,
    class_names: Sequence[str],
    num_cells: int = 24,
    num_columns: int = 6,
    num_samples: int | None = None,
) -> Path:
    """Write the sheet: right answers first, then wrong ones, about half each, spread evenly over the pictures.

    Its title says of how many images they are chosen, and what share that is of `num_samples`, all that were measured;
    None: those given are all.

    `images` uint8 RGB [N, H, W, 3], `labels` int [N], `top_classes` int [N, K] and `top_probabilities` [N, K], best
    first, of which up to three are shown. The same arguments give the same file, and the file appears whole or not
    at all. Raises UserError without pictures or classes, and for a label or an answer that is no class.
    """
    _check(images, labels, top_classes, top_probabilities, class_names)
    right_N = top_classes[:, 0] == labels
    chosen = _choose(right_N, num_cells)
    num_columns = min(num_columns, len(chosen))
    num_rows = -(-len(chosen) // num_columns)
    top = _MARGIN + 2 * _TITLE_LINE + _GAP
    # The title needs the width of two cells, also above a single one.
    width = 2 * _MARGIN + max(2, num_columns) * (_CELL_WIDTH + _GAP) - _GAP
    sheet = Image.new("RGB", (width, top + num_rows * (_CELL_HEIGHT + _GAP) - _GAP + _MARGIN), _PAPER)
    _draw_title(sheet, right_N, chosen, num_samples or len(right_N))
    for cell, index in enumerate(chosen):
        row, column = divmod(cell, num_columns)
        answers = [
            (int(answer), float(p)) for answer, p in zip(top_classes[index], top_probabilities[index], strict=True)
        ][:_NUM_ANSWERS]
        drawn = _draw_cell(images[index], int(labels[index]), answers, class_names)
        sheet.paste(drawn, (_MARGIN + column * (_CELL_WIDTH + _GAP), top + row * (_CELL_HEIGHT + _GAP)))
    return _save(sheet, Path(path))


def _choose(right_N: np.ndarray, num_cells: int) -> list[int]:
    """Indices of at most `num_cells` pictures: right ones, then wrong ones, half each while there are enough."""
    right, wrong = np.flatnonzero(right_N), np.flatnonzero(~right_N)
    num_wrong = min(len(wrong), max(num_cells // 2, num_cells - len(right)))
    num_right = min(len(right), num_cells - num_wrong)
    return [*_spread(right, num_right), *_spread(wrong, num_wrong)]


def _spread(indices: np.ndarray, count: int) -> list[int]:
    """`count` of the indices at even distances: data sets are often sorted by class, and the first are all alike."""
    return [int(indices[i * len(indices) // count]) for i in range(count)]


def describe_share(right_N: np.ndarray, chosen: list[int], num_samples: int) -> tuple[str, str]:
    """Return the sheet's title and the line below it: how many are right, and what share of all is shown."""
    num_right, shown = int(right_N.sum()), int(right_N[chosen].sum())
    title = f"{num_right:,} of {len(right_N):,} right ({num_right / len(right_N):.1%})"
    if len(right_N) < num_samples:
        title += f", among {len(right_N) / num_samples:.1%} of all {num_samples:,}"
    share = f"{len(chosen) / num_samples:.1%} of all"
    below = f"shown: {shown} right, {len(chosen) - shown} wrong, {share}; the true class in bold, then the best answers"
    return title, below


def _draw_title(sheet: Image.Image, right_N: np.ndarray, chosen: list[int], num_samples: int) -> None:
    draw = ImageDraw.Draw(sheet)
    title, below = describe_share(right_N, chosen, num_samples)
    draw.text((_MARGIN, _MARGIN), title, _INK, _font(20, bold=True))
    font = _font(13)
    draw.text((_MARGIN, _MARGIN + _TITLE_LINE + 4), _shorten(below, font, sheet.width - 2 * _MARGIN), _FAINT, font)


def _draw_cell(
    image: np.ndarray, label: int, answers: list[tuple[int, float]], class_names: Sequence[str]
) -> Image.Image:
    is_right = answers[0][0] == label
    colour = _RIGHT if is_right else _WRONG
    cell = Image.new("RGB", (_CELL_WIDTH, _CELL_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(cell)
    draw.rounded_rectangle((0, 0, _CELL_WIDTH - 1, _CELL_HEIGHT - 1), 8, _CELL, colour, _EDGE)
    picture = _fit(image)
    cell.paste(picture, (_PADDING + (_PICTURE - picture.width) // 2, _PADDING + (_PICTURE - picture.height) // 2))
    y = _PICTURE + 2 * _PADDING
    mark, mark_width = "✓" if is_right else "✗", 22
    draw.text((_PADDING, y), mark, colour, _font(16, bold=True))
    font = _font(14, bold=True)
    for line in _wrap(class_names[label], font, _PICTURE - mark_width, max_lines=2):
        draw.text((_PADDING + mark_width, y), line, _INK, font)
        y += _NAME_LINE
    y = _PICTURE + 2 * _PADDING + _NAME_SPACE
    for answer, probability in answers:
        _draw_answer(draw, y, class_names[answer], probability, answer == label)
        y += _ANSWER_LINE
    return cell


def _draw_answer(draw: ImageDraw.ImageDraw, y: int, name: str, probability: float, is_true: bool) -> None:
    """One line: the name over a bar as long as its probability, which stands at the right."""
    font = _font(12)
    bar_end = _PADDING + round(_PICTURE * probability)
    draw.rectangle(
        (_PADDING, y, max(bar_end, _PADDING + 1), y + _ANSWER_LINE - 4), _RIGHT_BAR if is_true else _WRONG_BAR
    )
    percent = f"{probability:.0%}" if probability >= 0.01 else "<1%"
    middle = y + (_ANSWER_LINE - 4) // 2
    draw.text((_PADDING + _PICTURE - 4, middle), percent, _INK, font, anchor="rm")
    draw.text((_PADDING + 4, middle), _shorten(" ".join(name.split()), font, _PICTURE - 52), _INK, font, anchor="lm")


def _fit(image: np.ndarray) -> Image.Image:
    """The picture as large as its cell allows, aspect kept: a tiny one shows its pixels, a large one is smoothed."""
    picture = Image.fromarray(image)
    longest = max(picture.size)
    size = (max(1, picture.width * _PICTURE // longest), max(1, picture.height * _PICTURE // longest))
    return picture.resize(size, Image.Resampling.NEAREST if longest < _PICTURE else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """The text in at most `max_lines` lines of `width` pixels, broken at spaces; what is left over is shortened."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(_shorten(" ".join(words[:count]), font, width))
        words = words[count:]
    return [*lines, _shorten(" ".join(words), font, width)] if words else lines


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or what of it fits into `width` pixels; names that are confused often differ at their end, so the
    middle is left out.
    """
    shown, kept = text, len(text)
    while font.getlength(shown) > width and kept > 1:
        kept -= 1
        shown = f"{text[: kept - kept // 2].rstrip()}…{text[len(text) - kept // 2 :].lstrip()}"
    return shown


def write_sample_sheet(path: Path, images: np.ndarray, captions: Sequence[str], num_columns: int = 6) -> Path:
    """Write a PNG of training samples, each over its caption, as the model is given them.

    `images` uint8 RGB [N, H, W, 3]. Raises UserError without any.
    """
    if not len(images):
        raise UserError("there are no samples to show")
    num_columns = min(num_columns, len(images))
    height = _PICTURE + 2 * _PADDING + _NAME_SPACE
    size = (num_columns * (_CELL_WIDTH + _GAP) + _GAP, -(-len(images) // num_columns) * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), _font(14)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _GAP + i % num_columns * (_CELL_WIDTH + _GAP), _GAP + i // num_columns * (height + _GAP)
        draw.rounded_rectangle((x, y, x + _CELL_WIDTH - 1, y + height - 1), 8, _CELL)
        sheet.paste(_fit(image), (x + _PADDING, y + _PADDING))
        for line, text in enumerate(_wrap(caption, font, _PICTURE, max_lines=2)):
            draw.text((x + _PADDING, y + _PICTURE + 2 * _PADDING + line * _NAME_LINE), text, _INK, font)
    return _save(sheet, path)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, so a sheet looks the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    package = importlib.util.find_spec("matplotlib")  # found, not imported: that takes a second
    assert package and package.origin
    return ImageFont.truetype(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / name, size)


def _save(sheet: Image.Image, path: Path) -> Path:
    with whole_file(path) as target:
        sheet.save(target, format="PNG")
    return path


def _check(
    images: np.ndarray,
    labels: np.ndarray,
    top_classes: np.ndarray,
    top_probabilities: np.ndarray,
    class_names: Sequence[str],
) -> None:
    if not class_names:
        raise UserError("the list of classes is empty: a contact sheet needs the names of the classes")
    if not len(images):
        raise UserError("no pictures for a contact sheet: the data set is empty")
    if not len(images) == len(labels) == len(top_classes) or top_classes.shape != top_probabilities.shape:
        raise ValueError(
            f"{len(images)} pictures, {len(labels)} labels, "
            f"answers {top_classes.shape}, probabilities {top_probabilities.shape}"
        )
    for what, values in (("label", labels), ("answer", top_classes)):
        wrong = values[(values < 0) | (values >= len(class_names))]
        if wrong.size:
            allowed = f"the class list has {len(class_names)} classes, 0 to {len(class_names) - 1}"
            raise UserError(f"{what} {int(wrong[0])} of the contact sheet is out of range: {allowed}")
