"""Sources to measure on without a download: digits, sentiment, shapes."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from rayclip.config import DigitsConfig, SentimentConfig, ShapesConfig
from rayclip.data.samples.glyphs import PALETTE
from rayclip.data.sources import SOURCES, sentiment, shapes

CONFIGS = [DigitsConfig(), SentimentConfig(train=60, test=40), ShapesConfig(train=60, test=40)]


def listed(config):
    return SOURCES[config.kind].splits(config, Path("unused"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_splits_have_every_class_and_nothing_in_common(config):
    train, test = (listed(config)[name] for name in ("train", "test"))
    for split in (train, test):
        assert {item.cls for item in split.items} == set(range(len(split.class_names)))
        assert split.class_names == train.class_names
    assert not set(train.items) & set(test.items)
    assert [repr(item) for item in listed(config)["test"].items] == [repr(item) for item in test.items]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_a_picture_is_a_function_of_its_item(config):
    source = SOURCES[config.kind]
    for item in listed(config)["test"].items[:5]:
        first, again = (source.read(item, config) for _ in range(2))
        assert first.image.tobytes() == again.image.tobytes()
        assert (first.image.size, first.image.mode) == ((config.size, config.size), "RGB")
        assert first.caption == listed(config)["test"].class_names[first.cls]


def test_digits_are_those_of_scikit_learn():
    digits = load_digits()
    config = DigitsConfig(size=8)
    for item in listed(config)["test"].items[:20]:
        record = SOURCES["digits"].read(item, config)
        assert record.cls == digits.target[item.number]
        ink = 255 - np.asarray(record.image.convert("L"), dtype=float)
        np.testing.assert_allclose(ink, digits.images[item.number] * 255 / 16, atol=1)


def test_words_of_sentiment_are_of_one_side_and_one_split():
    words = [set(side) for split in sentiment._ADJECTIVES.values() for side in split]
    assert sum(map(len, words)) == len(set.union(*words))
    for split in listed(CONFIGS[1]).values():
        for item in split.items:
            said = [any(word in item.sentence for word in side) for side in (words[0] | words[2], words[1] | words[3])]
            assert said == [item.cls == 0, item.cls == 1]


def test_text_stays_within_the_picture():
    for config in (SentimentConfig(size=64, test=30), SentimentConfig(size=224, test=30)):
        for item in listed(config)["test"].items:
            pixels = np.asarray(SOURCES["sentiment"].read(item, config).image)
            assert pixels.min() < 64
            assert (np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]) == 255).all()


def test_as_many_shapes_are_there_as_the_class_says():
    config = ShapesConfig(size=192, test=64)
    for item in listed(config)["test"].items:
        pixels = np.asarray(SOURCES["shapes"].read(item, config).image).astype(int)
        ground = min(PALETTE.values(), key=lambda colour: abs(pixels[0, 0] - colour).sum())
        _, found = ndimage.label(abs(pixels - ground).sum(axis=2) > 12)
        assert found == item.cls + shapes.LEAST
