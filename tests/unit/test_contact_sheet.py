"""The contact sheet: which pictures it shows, what colours they get, and that it is written whole."""

import numpy as np
import pytest
from PIL import Image

from rayclip.errors import UserError
from rayclip.evaluation import contact_sheet
from rayclip.evaluation.contact_sheet import write_contact_sheet, write_sample_sheet

GREEN, RED = (0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)
NAMES = ["cat", "dog", "a name that is far too long for two lines of its cell and has to be shortened", "Straßenbahn"]


def answers(num_right, num_wrong):
    """Pictures of noise; the first `num_right` have the right answer first."""
    count = num_right + num_wrong
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(count) % len(NAMES)
    first = np.where(np.arange(count) < num_right, labels, (labels + 1) % len(NAMES))
    top = np.stack([first, (first + 1) % len(NAMES), (first + 2) % len(NAMES)], axis=1)
    return images, labels, top, np.tile([0.7, 0.2, 0.001], (count, 1))


def edges(path):
    """How many cells have a green and how many a red edge: little else on a sheet has these colours."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    one_edge = 2 * (contact_sheet._CELL_WIDTH + contact_sheet._CELL_HEIGHT) * contact_sheet._EDGE
    return tuple(round((pixels == colour).all(-1).sum() / one_edge) for colour in (GREEN, RED))


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "expected"),
    [(30, 30, (6, 6)), (2, 30, (2, 10)), (30, 1, (11, 1)), (3, 2, (3, 2)), (0, 1, (0, 1))],
)
def test_half_is_right_and_half_wrong_while_there_are_enough(tmp_path, num_right, num_wrong, expected):
    path = write_contact_sheet(tmp_path / "sheet.png", *answers(num_right, num_wrong), NAMES, num_cells=12)
    assert edges(path) == expected


def test_its_title_says_what_share_of_all_it_shows():
    right = np.arange(512) < 128
    title, below = contact_sheet.describe_share(right, [0, 1, 200], 10_000)
    assert title == "128 of 512 right (25.0%), among 5.1% of all 10,000"
    assert below.startswith("shown: 2 right, 1 wrong, 0.0% of all;")
    assert contact_sheet.describe_share(right, [0], 512)[0] == "128 of 512 right (25.0%)"


def test_the_same_answers_give_the_same_file(tmp_path):
    first = write_contact_sheet(tmp_path / "a.png", *answers(40, 40), NAMES)
    second = write_contact_sheet(tmp_path / "new" / "b.png", *answers(40, 40), NAMES)
    assert first.read_bytes() == second.read_bytes()


def test_pictures_are_spread_over_the_data_set():
    chosen = contact_sheet._choose(np.arange(100) < 50, 10)
    assert chosen == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]


def test_a_tiny_picture_shows_its_pixels(tmp_path):
    images, labels, top, probabilities = answers(1, 0)
    images[0] = (200, 30, 90)
    images[0, 0, 0] = (0, 0, 255)
    path = write_contact_sheet(tmp_path / "sheet.png", images, labels, top, probabilities, NAMES)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    side = contact_sheet._PICTURE // 8
    assert (pixels == (0, 0, 255)).all(-1).sum() == side**2
    assert (pixels == (200, 30, 90)).all(-1).sum() == 63 * side**2


@pytest.mark.parametrize("shape", [(20, 300), (300, 20), (1, 1), (700, 700)])
def test_pictures_of_any_size_fit(tmp_path, shape):
    images, labels, top, probabilities = np.zeros((1, *shape, 3), np.uint8), *answers(1, 0)[1:]
    path = write_contact_sheet(tmp_path / "sheet.png", images, labels, top[:, :1], probabilities[:, :1], NAMES)
    assert Image.open(path).size == Image.open(write_contact_sheet(path, *answers(1, 0), NAMES)).size


def test_long_names_keep_their_ends():
    font = contact_sheet._font(12)
    for text in (NAMES[2], "x" * 300):
        shown = contact_sheet._shorten(text, font, 150)
        head, tail = shown.split("…")
        assert text.startswith(head) and text.endswith(tail)
        assert font.getlength(shown) <= 150
        lines = contact_sheet._wrap(text, font, 150, max_lines=2)
        assert len(lines) <= 2
        assert all(font.getlength(line) <= 150 for line in lines)
    assert contact_sheet._wrap("one two", font, 150, max_lines=2) == ["one two"]


def test_a_failed_write_leaves_the_old_sheet(tmp_path, monkeypatch):
    path = write_contact_sheet(tmp_path / "sheet.png", *answers(1, 1), NAMES)
    before = path.read_bytes()

    def fail(self, target, format):
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_contact_sheet(path, *answers(4, 4), NAMES)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_shown_is_named(tmp_path):
    path = tmp_path / "sheet.png"
    images, labels, top, probabilities = answers(2, 2)
    with pytest.raises(UserError, match="list of classes is empty"):
        write_contact_sheet(path, images, labels, top, probabilities, [])
    with pytest.raises(UserError, match="no pictures"):
        write_contact_sheet(path, images[:0], labels[:0], top[:0], probabilities[:0], NAMES)
    with pytest.raises(UserError, match="label 9 of the contact sheet is out of range: the class list has 4 classes"):
        write_contact_sheet(path, images, np.array([0, 9, 1, 1]), top, probabilities, NAMES)
    with pytest.raises(UserError, match="answer -1 of the contact sheet is out of range"):
        write_contact_sheet(path, images, labels, np.where(top == 0, -1, top), probabilities, NAMES)
    with pytest.raises(ValueError, match="4 pictures, 3 labels"):
        write_contact_sheet(path, images, labels[:3], top, probabilities, NAMES)
    assert not path.exists()


def test_a_sheet_of_training_samples_shows_each(tmp_path):
    images = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    images[:, :, :] = np.array([[200, 30, 30], [30, 200, 30]] * 4, dtype=np.uint8)[:, None, None]
    path = write_sample_sheet(tmp_path / "samples.png", images, [f"caption {i}" for i in range(8)])
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for colour in ([200, 30, 30], [30, 200, 30]):
        assert (pixels == colour).all(axis=1).sum() == 4 * 216 * 216
