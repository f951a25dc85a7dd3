"""How much of its accuracy a model keeps under shift: corruption errors, and robustness beyond what accuracy foretells.

Accuracies and errors are fractions of 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from rayclip.errors import UserError

Errors = Mapping[str, Sequence[float]]
"""A corruption's error at each strength, by its name."""


def mean_corruption_error(errors: Errors, baseline: Errors | None = None) -> float:
    """The mean over corruptions of their error, a mean over strengths; with a baseline each is divided by the other
    model's first (mCE of Hendrycks and Dietterich 2019, as a fraction: 1 is as robust as the baseline).

    Raises UserError where there is nothing to average, or the baseline lacks something or makes no error.
    """
    if not errors or not all(errors.values()):
        raise UserError("a mean corruption error needs a corruption with the error of at least one strength")
    return sum(_relative(name, errors[name], baseline) for name in errors) / len(errors)


def _relative(name: str, errors: Sequence[float], baseline: Errors | None) -> float:
    if baseline is None:
        return sum(errors) / len(errors)
    theirs = baseline.get(name, ())
    if len(theirs) != len(errors) or not sum(theirs):
        raise UserError(f"the baseline has no errors of '{name}' at {len(errors)} strengths to divide by")
    return sum(errors) / sum(theirs)


@dataclass(frozen=True)
class BaselineLine:
    """logit(shifted) = intercept + slope * logit(accuracy), with the covariance of both and what is left, `df` free."""

    intercept: float
    slope: float
    covariance: np.ndarray
    df: int

    def shifted(self, accuracy: float) -> float:
        """The accuracy under shift of a model that is as robust as those the line was fitted over."""
        return float(expit(self.intercept + self.slope * logit(accuracy)))


@dataclass(frozen=True)
class EffectiveRobustness:
    """Accuracy under shift beyond what the line foretells from the accuracy without, and its 95% interval."""

    value: float
    low: float
    high: float
    expected: float


def fit_baseline(accuracies: Sequence[float], shifted: Sequence[float]) -> BaselineLine:
    """The line of Taori et al. 2020 (arXiv:2007.00644): least squares in logit space over other models.

    Raises UserError for fewer than three models, for accuracies that are not inside 0..1, or that are all the same.
    """
    if len(accuracies) != len(shifted) or len(accuracies) < 3:
        raise UserError(f"a baseline line needs both accuracies of 3 models, got {len(accuracies)} and {len(shifted)}")
    outside = [value for value in (*accuracies, *shifted) if not 0 < value < 1]
    if outside:
        raise UserError(f"accuracies of a baseline line lie inside 0..1, got {outside[0]}")
    if len(set(accuracies)) == 1:
        raise UserError(f"all models of a baseline line have accuracy {accuracies[0]}: there is no slope")
    design = np.stack([np.ones(len(accuracies)), logit(accuracies)], axis=1)
    observed = logit(np.asarray(shifted))
    (intercept, slope), *_ = np.linalg.lstsq(design, observed, rcond=None)
    df = len(accuracies) - 2
    left = observed - design @ (intercept, slope)
    covariance = float(left @ left) / df * np.linalg.inv(design.T @ design)
    return BaselineLine(float(intercept), float(slope), covariance, df)


def effective_robustness(
    line: BaselineLine, correct: int, num_samples: int, shifted_correct: int, num_shifted: int
) -> EffectiveRobustness:
    """Of a model with so many right answers without and under shift.

    The interval (delta method, Student's t) counts the pictures of both data sets as drawn, and the line as fitted
    over few models; it does not count how far single models scatter about it. Half a picture is added to right and to
    wrong answers without shift, so that their logit is finite. Raises UserError for counts that do not fit.
    """
    for right, total in ((correct, num_samples), (shifted_correct, num_shifted)):
        if total < 1 or not 0 <= right <= total:
            raise UserError(f"robustness needs 0 <= correct <= samples and a sample, got {right} of {total}")
    accuracy, shifted = (correct + 0.5) / (num_samples + 1), shifted_correct / num_shifted
    expected = line.shifted(accuracy)
    place = np.array([1.0, logit(accuracy)])
    logit_variance = 1 / (num_samples * accuracy * (1 - accuracy))
    expected_variance = (expected * (1 - expected)) ** 2 * (
        float(place @ line.covariance @ place) + line.slope**2 * logit_variance
    )
    # Smoothed alike: of none or all right the spread is not zero.
    smooth = (shifted_correct + 0.5) / (num_shifted + 1)
    half = float(stats.t.ppf(0.975, line.df)) * math.sqrt(expected_variance + smooth * (1 - smooth) / num_shifted)
    value = shifted - expected
    return EffectiveRobustness(value, value - half, value + half, expected)
