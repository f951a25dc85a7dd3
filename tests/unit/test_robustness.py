"""Corruptions: the same by position, worse with strength; robustness against SciPy's regression and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from rayclip.errors import UserError
from rayclip.evaluation.corruptions import CORRUPTIONS, corrupt
from rayclip.evaluation.robustness import effective_robustness, fit_baseline, mean_corruption_error


def picture(side):
    """Waves in each colour, some noise."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(9 * x + 3 * c) * np.cos((7 - c) * y) for c in range(3)]
    noise = np.random.default_rng(0).normal(size=(side, side, 3)) * 8
    return np.clip(110 + 80 * np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("side", [32, 96, 224])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_keeps_the_shape_and_grows_with_its_strength(name, side):
    clean = picture(side)
    kept = clean.copy()
    worse = [corrupt(clean, name, strength, position=7) for strength in range(1, 6)]
    assert all(image.shape == clean.shape and image.dtype == np.uint8 for image in worse)
    assert np.array_equal(clean, kept)
    distance = [float(np.square(image.astype(float) - clean).mean()) for image in worse]
    assert distance[0] > 0
    # JPEG's distance from a small picture hardly grows.
    assert all(0.97 * weak <= strong for weak, strong in itertools.pairwise(distance))
    assert distance[4] > distance[0]


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise"])
def test_noise_is_a_function_of_seed_and_position(name):
    image = picture(32)
    fourth, fifth = (corrupt(image, name, 3, position) for position in (4, 5))
    assert np.array_equal(fifth, corrupt(image, name, 3, position=5))
    assert not np.array_equal(fourth, fifth)
    assert not np.array_equal(fourth, corrupt(image, name, 3, position=4, seed=1))


def test_noise_has_the_published_spread_at_224_pixels():
    grey = np.full((224, 224, 3), 128, np.uint8)
    spread = [corrupt(grey, "gaussian_noise", s, 0).astype(float).std() / 255 for s in (1, 2)]
    assert spread == pytest.approx([0.08, 0.12], rel=0.02)
    shot = corrupt(grey, "shot_noise", 1, 0).astype(float).std() / 255
    assert shot == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.02)


def test_brightness_keeps_the_hue():
    image = np.full((8, 8, 3), (100, 50, 0), np.uint8)
    assert corrupt(image, "brightness", 2, 0)[0, 0].tolist() == pytest.approx([151, 75.5, 0], abs=1)
    assert corrupt(np.zeros((8, 8, 3), np.uint8), "brightness", 2, 0)[0, 0].tolist() == [51, 51, 51]


def test_mean_corruption_error_by_hand():
    errors, baseline = {"a": [0.2, 0.4], "b": [0.5, 0.5]}, {"a": [0.4, 0.8], "b": [0.5, 0.5]}
    assert mean_corruption_error(errors) == pytest.approx(0.4)
    assert mean_corruption_error(errors, baseline) == pytest.approx(0.75)


def models(num, seed=0):
    random = np.random.default_rng(seed)
    accuracy = random.uniform(0.3, 0.9, num)
    return accuracy, expit(-0.7 + 0.9 * logit(accuracy) + 0.05 * random.normal(size=num))


def test_the_line_is_scipys_in_logits():
    accuracy, shifted = models(12)
    line, expected = fit_baseline(accuracy, shifted), stats.linregress(logit(accuracy), logit(shifted))
    assert (line.slope, line.intercept) == pytest.approx((expected.slope, expected.intercept))
    errors = (expected.intercept_stderr**2, expected.stderr**2)
    assert tuple(np.diag(line.covariance)) == pytest.approx(errors)


def test_a_model_on_the_line_has_none_and_one_above_has_its_distance():
    accuracy, shifted = models(40)
    line = fit_baseline(accuracy, shifted)
    on = effective_robustness(line, 6000, 10_000, round(10_000 * line.shifted(0.6)), 10_000)
    above = effective_robustness(line, 6000, 10_000, round(10_000 * line.shifted(0.6)) + 1000, 10_000)
    assert on.value == pytest.approx(0, abs=2e-4)
    assert on.low < 0 < on.high
    assert above.value - on.value == pytest.approx(0.1)
    assert above.low > 0


def test_95_percent_intervals_cover_about_95_percent():
    random, covered, trials = np.random.default_rng(3), 0, 400
    for trial in range(trials):
        line = fit_baseline(*models(12, seed=trial))
        truth = expit(-0.7 + 0.9 * logit(0.6))
        found = effective_robustness(line, random.binomial(800, 0.6), 800, random.binomial(600, truth + 0.1), 600)
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / trials <= 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(picture(8), "jpg", 1, 0), "unknown corruption 'jpg'"),
        (lambda: corrupt(picture(8), "jpeg", 6, 0), "strengths 1 to 5, got 6"),
        (lambda: mean_corruption_error({}), "at least one strength"),
        (lambda: mean_corruption_error({"a": [0.1]}, {"b": [0.1]}), "no errors of 'a' at 1 strengths"),
        (lambda: fit_baseline([0.1, 0.2], [0.1, 0.2]), "of 3 models, got 2 and 2"),
        (lambda: fit_baseline([0.1, 0.2, 1.0], [0.1, 0.2, 0.3]), "inside 0..1, got 1.0"),
        (lambda: fit_baseline([0.1] * 3, [0.1, 0.2, 0.3]), "there is no slope"),
        (lambda: effective_robustness(fit_baseline(*models(5)), 3, 2, 1, 2), "got 3 of 2"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
