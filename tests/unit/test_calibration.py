"""Calibration and confusions by other formulas, gains between answers to the same pictures by SciPy and simulation."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from rayclip.errors import UserError
from rayclip.evaluation.calibration import (
    calibration_error,
    confusions,
    reliability,
    write_confusions,
    write_reliability,
)
from rayclip.evaluation.paired import gain_over_best, paired_gain

NUM, CLASSES = 300, 7


@pytest.fixture(scope="module")
def answers():
    """Probabilities, labels, and with them the confidences and answers."""
    probabilities = (2 * torch.randn(NUM, CLASSES, generator=torch.Generator().manual_seed(0))).softmax(1)
    confidence, answer = probabilities.max(1)
    return probabilities, torch.arange(NUM) % CLASSES, confidence, answer


def test_bins_add_up_to_the_calibration_error(answers):
    _, labels, confidence, answer = answers
    bins = reliability(confidence, answer == labels, 10)
    assert sum(one.count for one in bins) == NUM
    expected = 0.0
    sure, right = confidence.double().numpy(), (answer == labels).numpy()
    for low in range(10):
        inside = (sure > low / 10) & (sure <= (low + 1) / 10)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert calibration_error(bins) == pytest.approx(expected, abs=1e-12)
    for one in bins:
        inside = (confidence > one.low) & (confidence <= one.high)
        assert one.count == int(inside.sum())
        assert one.accuracy == pytest.approx(float((answer == labels)[inside].double().mean()))
        assert one.accuracy_low <= one.accuracy <= one.accuracy_high


def test_confusions_are_the_largest_of_the_matrix_off_its_diagonal(answers):
    _, labels, _, answer = answers
    matrix = np.zeros((CLASSES, CLASSES), int)
    for label, given in zip(labels.tolist(), answer.tolist(), strict=True):
        matrix[label, given] += label != given
    found = confusions(labels, answer, CLASSES, most=5, examples=2)
    assert [one.count for one in found] == sorted(matrix.flatten().tolist(), reverse=True)[:5]
    for one in found:
        assert matrix[one.label, one.answer] == one.count
        assert one.share == pytest.approx(one.count / int((labels == one.label).sum()))
        assert all((int(labels[row]), int(answer[row])) == (one.label, one.answer) for row in one.rows)
    assert confusions(labels, labels, CLASSES) == []


def test_pictures_are_the_same_each_time(answers, tmp_path):
    _, labels, confidence, answer = answers
    names = ["$a_b$ and " + "long " * 20, *("x" for _ in range(CLASSES - 1))]
    for name in ("one", "two"):
        write_reliability(tmp_path / f"{name}-reliability.png", reliability(confidence, answer == labels))
        write_confusions(tmp_path / f"{name}-confusions.png", confusions(labels, answer, CLASSES), names)
    for kind in ("reliability", "confusions"):
        first, second = (tmp_path / f"{name}-{kind}.png" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        assert len(np.unique(np.asarray(Image.open(first)))) > 20


def test_a_gain_is_mcnemars():
    first, second = torch.tensor([1, 1, 1, 1, 1, 0, 0, 1]) > 0, torch.tensor([1, 0, 0, 0, 0, 1, 0, 1]) > 0
    gain = paired_gain(first, second)
    assert (gain.won, gain.lost, gain.value) == (4, 1, 3 / 8)
    assert gain.p_value == pytest.approx(2 * stats.binom.cdf(1, 5, 0.5))
    same = paired_gain(first, first)
    assert same.value == 0 and same.p_value == 1 and same.low < 0 < same.high


def test_95_percent_intervals_of_gains_cover_about_95_percent():
    random, covered, trials = np.random.default_rng(0), 0, 500
    for _ in range(trials):
        outcome = torch.tensor(random.choice(4, 150, p=[0.6, 0.12, 0.05, 0.23]))
        gain = paired_gain(outcome <= 1, (outcome == 0) | (outcome == 2))
        covered += gain.low <= 0.07 <= gain.high
    assert 0.92 <= covered / trials <= 0.98


def test_the_ensemble_is_compared_with_the_best_template():
    random = np.random.default_rng(0)
    templates = torch.tensor(random.random((4, 200)) < np.array([[0.5], [0.7], [0.6], [0.2]]))
    ensemble = templates[1] | (torch.tensor(random.random(200)) < 0.3)
    best = gain_over_best(ensemble, templates)
    assert best.index == 1
    assert best.gain == pytest.approx(float(ensemble.double().mean() - templates[1].double().mean()))
    assert 0 < best.low <= best.gain <= best.high
    # With one template there is nothing to choose: about the interval of pairs.
    alone, pairs = gain_over_best(ensemble, templates[1:2]), paired_gain(ensemble, templates[1])
    assert (alone.low, alone.high) == pytest.approx((pairs.low, pairs.high), abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reliability(torch.zeros(0), torch.zeros(0) > 0), "got 0 and 0"),
        (lambda: paired_gain(torch.ones(2) > 0, torch.ones(3) > 0), "got 2 and 3"),
        (lambda: gain_over_best(torch.ones(2) > 0, torch.ones(0, 2) > 0), r"got 2 pictures and answers \[0, 2\]"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_nothing_confused_is_said(tmp_path):
    with pytest.raises(UserError, match="every answer is right"):
        write_confusions(tmp_path / "none.png", [], ["a"])
