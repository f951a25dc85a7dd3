"""The embedded data set: what is held out is never shown, and pictures are what their captions say."""

import itertools

import numpy as np
import pytest

from rayclip.config import GlyphsConfig
from rayclip.data.samples import fonts, glyphs
from rayclip.errors import UserError

CONFIG = GlyphsConfig()


@pytest.fixture(scope="module")
def items():
    return {split: glyphs.build(split, CONFIG) for split in glyphs.SPLITS}


def test_sizes_of_the_splits(items):
    assert len(items["train"]) > 40_000
    assert 1_000 < len(glyphs.class_names("held_out_font")) < 1_500
    assert 100 <= len(glyphs.class_names("unseen_combinations")) <= 200


def test_training_shows_no_held_out_face_and_no_unseen_combination(items):
    unseen = {item.char for item in items["unseen_combinations"]}
    assert not unseen & {item.char for split in ("train", "held_out_font") for item in items[split]}
    assert {item.face for item in items["train"]} == set(fonts.TRAIN_FACES)
    assert {item.face for item in items["held_out_font"]} == set(fonts.HELD_OUT_FACES)
    assert {item.face for item in items["unseen_combinations"]} <= set(fonts.TRAIN_FACES)


def test_every_held_out_letter_is_trained_on_in_another_font(items):
    assert {item.char for item in items["held_out_font"]} <= {item.char for item in items["train"]}


def test_letters_and_marks_of_unseen_combinations_are_trained_on_apart(items):
    train = {item.char for item in items["train"]}
    seen = [parts for char in train if (parts := fonts.split_combination(char))]
    letters = {fonts.name_of(char) for char in train} | {letter for letter, _ in seen}
    for char in fonts.unseen_combinations():
        letter, marks = fonts.split_combination(char)
        assert letter in letters
        assert all(sum(mark in seen_marks for _, seen_marks in seen) >= 5 for mark in marks)


def test_unseen_combinations_are_the_same_ones_forever():
    names = glyphs.class_names("unseen_combinations")
    assert "latin small letter e with acute" in names
    assert "latin capital letter e with acute" not in names


def test_classes_are_indexed_by_name(items):
    for split in ("held_out_font", "unseen_combinations"):
        names = glyphs.class_names(split)
        assert len(set(names)) == len(names)
        assert {item.cls for item in items[split]} == set(range(len(names)))
        for item in items[split][::101]:
            _, caption, cls = glyphs.render(item, 36)
            assert names[cls] == caption == fonts.name_of(item.char)


def test_a_picture_is_a_function_of_its_item(items):
    for item in items["train"][::5003]:
        first, again = glyphs.render(item, 36), glyphs.render(item, 36)
        assert first[0].tobytes() == again[0].tobytes()
        assert first[1:] == again[1:]
    other = glyphs.build("train", CONFIG.model_copy(update={"seed": 1}))
    assert glyphs.render(other[0], 36)[0].tobytes() != glyphs.render(items["train"][0], 36)[0].tobytes()


@pytest.mark.parametrize("size", [32, 64])
def test_ink_is_there_and_keeps_clear_of_the_edge(items, size):
    still = itertools.repeat(0.5).__next__
    for item in items["train"][::499]:
        mask = glyphs._mask(item.face, item.char, size, still)
        assert mask.shape == (size, size)
        assert mask.max() > 0.2, fonts.name_of(item.char)
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert edge.max() == 0, fonts.name_of(item.char)


def test_case_can_be_seen_where_the_shape_is_the_same():
    def height(char, draw):
        rows = glyphs._mask("DejaVuSans", char, 32, iter([draw] * 10).__next__).max(axis=1) > 0.3
        return rows.sum()

    assert height("O", 0.0) > height("o", 0.999)


def test_captions_say_what_is_true(items):
    captions = [(item, glyphs.render(item, 16)[1]) for item in items["train"][::37]]
    plain = sum(caption == fonts.name_of(item.char) for item, caption in captions) / len(captions)
    assert abs(plain - CONFIG.plain_share) < 0.05
    for item, caption in captions:
        name = fonts.name_of(item.char)
        assert name in caption
        said = caption.replace(name, "").split()
        face = fonts.TRAIN_FACES[item.face]
        assert "bold" not in said or face.bold
        assert "italic" not in said or face.italic


def test_characters_are_drawable_and_named():
    for face in fonts.TRAIN_FACES:
        chars = fonts.characters(face)
        assert " " not in chars
        assert "\u0301" not in chars
        assert not any(0xE000 <= ord(char) <= 0xF8FF for char in chars)


def test_a_split_that_there_is_not():
    with pytest.raises(UserError, match=r"held_out_fonts.*held_out_font"):
        glyphs.build("held_out_fonts", CONFIG)
