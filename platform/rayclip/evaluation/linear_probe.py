"""Linear probes as in appendix A.3 of the CLIP paper (Radford et al. 2021): how good features are for a data set.

Features are those before the projection (`Encoder.encode_pooled`). The penalty's strength is searched for on the
validation split; then the probe is fitted anew on training and validation together.

Shapes: N samples, D features, C classes.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from rayclip.errors import UserError
from rayclip.evaluation import metrics
from rayclip.evaluation.logistic import TOLERANCE, Fit, LinearModel, LogisticRegression

STEPS_PER_DECADE = 8
LOWEST, HIGHEST = -6, 6  # decades
_NUM_STEPS = (HIGHEST - LOWEST) * STEPS_PER_DECADE
_COARSE_STEP = 2 * STEPS_PER_DECADE  # two decades, then half as far until neighbours are one step apart
_VALIDATION_SHOTS = 4

Metric = Callable[[Tensor, Tensor], float]
"""From scores [N, C] and labels [N] (bool targets [N, C] for several labels) to a value, the higher the better."""


def _roc_auc(scores_N2: Tensor, labels_N: Tensor) -> float:
    return metrics.roc_auc(scores_N2[:, 1] - scores_N2[:, 0], labels_N == 1)


METRICS: dict[str, Metric] = {
    "top1": metrics.accuracy,
    "mean_per_class": metrics.mean_per_class,
    "mean_top1_top5": metrics.mean_of_top1_and_top5,
    "eleven_point_map": metrics.eleven_point_map,
    "roc_auc": _roc_auc,
}
"""The metrics of the paper's data sets by name."""


@dataclass(frozen=True)
class Split:
    """Features [N, D] and what is true of them: class indices [N], or bool [N, C] for several labels."""

    features_ND: Tensor
    targets: Tensor

    def __add__(self, other: "Split") -> "Split":
        return Split(torch.cat([self.features_ND, other.features_ND]), torch.cat([self.targets, other.targets]))

    def __getitem__(self, rows: Tensor) -> "Split":
        return Split(self.features_ND[rows], self.targets[rows])


@dataclass(frozen=True)
class Search:
    """The best strength, and the validation metric of each that was tried, in the order of trying."""

    strength: float
    tried: dict[float, float]


@dataclass(frozen=True)
class Probe:
    """A probe fitted on training and validation, the search that chose its strength, its metric on the test split."""

    model: LinearModel
    fit: Fit
    search: Search
    value: float


@dataclass(frozen=True)
class FewShot:
    """The test metric of probes on `shots` samples a class: each seed's, their mean and its 95% interval (Student's t),
    which one seed does not have."""

    shots: int
    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None


def search_strength(score: Callable[[float], float]) -> Search:
    """The paper's search over 96 logarithmic steps from 1e-6 to 1e6: seven strengths two decades apart, then the
    interval around the best halved until its neighbours are an eighth of a decade away. 15 of 97 are scored, the
    strong ones first; of equal scores the stronger penalty's is the better.
    """
    values: dict[int, float] = {}

    def best_of(steps: Sequence[int]) -> int:
        for step in steps:
            if step not in values and 0 <= step <= _NUM_STEPS:
                values[step] = score(_strength(step))
        return max(values, key=lambda step: (values[step], step))

    best, gap = best_of(range(_NUM_STEPS, -1, -_COARSE_STEP)), _COARSE_STEP
    while gap > 1:
        gap //= 2
        best = best_of((best + gap, best - gap))
    return Search(_strength(best), {_strength(step): value for step, value in values.items()})


def _strength(step: int) -> float:
    return float(10 ** (LOWEST + step / STEPS_PER_DECADE))


def search_with(
    train: Split,
    validation: Split,
    num_classes: int,
    metric: Metric = metrics.accuracy,
    tolerance: float = TOLERANCE,
) -> tuple[Search, dict[float, Fit]]:
    """The search, and the fit on the training split of each strength it tried. Raises UserError as `linear_probe`."""
    regression = LogisticRegression(train.features_ND, train.targets, num_classes)
    fits: dict[float, Fit] = {}

    def score(strength: float) -> float:
        start = _start(strength, list(fits.values()))
        fits[strength] = regression.fit(strength, start, tolerance)
        return metric(fits[strength].model.scores(validation.features_ND), validation.targets)

    return search_strength(score), fits


def linear_probe(
    train: Split,
    validation: Split,
    test: Split,
    num_classes: int,
    metric: Metric = metrics.accuracy,
    tolerance: float = TOLERANCE,
) -> Probe:
    """Search, fit on training and validation, and measure on the test split.

    Raises UserError for labels that do not match, a class without samples, and splits of other features.
    """
    _check_widths(train, validation, test)
    search, fits = search_with(train, validation, num_classes, metric, tolerance)
    both = train + validation
    regression = LogisticRegression(both.features_ND, both.targets, num_classes)
    fit = regression.fit(search.strength, fits[search.strength].model, tolerance)
    return Probe(fit.model, fit, search, metric(fit.model.scores(test.features_ND), test.targets))


def few_shot(
    train: Split,
    validation: Split,
    test: Split,
    num_classes: int,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: int = 5,
    metric: Metric = metrics.accuracy,
) -> list[FewShot]:
    """Probes on few samples a class, drawn by (seed, shots); those of fewer shots are among those of more.

    The strength is chosen on at most four validation samples a class, for whoever has few has no more to choose by.
    Raises UserError where a class has fewer samples than the most shots, and for several labels a picture.
    """
    if seeds < 1 or not shots or min(shots) < 1:
        raise UserError(
            f"few-shot needs a seed and at least one sample a class, got {seeds} seeds, {list(shots)} shots"
        )
    _check_widths(train, validation, test)
    drawn = {k: [_few(train, validation, test, num_classes, k, seed, metric) for seed in range(seeds)] for k in shots}
    return [FewShot(k, tuple(values), *_mean_interval(values)) for k, values in drawn.items()]


def draw_shots(labels_N: Tensor, num_classes: int, shots: int, seed: int) -> Tensor:
    """Rows of `shots` samples of each class, int64 [C * shots]: a function of the labels, the seed and shots alone."""
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    # A stable sort: within its class a sample keeps the place it was drawn at.
    order_N = order_N[labels_N.cpu()[order_N].argsort(stable=True)]
    counts_C = torch.bincount(labels_N.cpu(), minlength=num_classes)
    small = (counts_C < shots).nonzero()
    if len(small):
        raise UserError(f"class {int(small[0])} has {int(counts_C[small[0]])} samples, fewer than {shots} shots")
    first_C = counts_C.cumsum(0) - counts_C
    rows = order_N[(first_C[:, None] + torch.arange(shots)).flatten()]
    return rows.to(labels_N.device)


def _few(
    train: Split, validation: Split, test: Split, num_classes: int, shots: int, seed: int, metric: Metric
) -> float:
    if train.targets.ndim != 1:
        raise UserError("few-shot needs one label a picture")
    fitted = train[draw_shots(train.targets, num_classes, shots, seed)]
    chosen_by = validation[draw_shots(validation.targets, num_classes, min(shots, _VALIDATION_SHOTS), seed)]
    search, fits = search_with(fitted, chosen_by, num_classes, metric)
    return metric(fits[search.strength].model.scores(test.features_ND), test.targets)


def _start(strength: float, fits: Sequence[Fit]) -> LinearModel | None:
    """On the line through the two nearest solutions: weights change about evenly with the logarithm of the strength,
    and as its logarithm exactly where classes are told apart and the penalty goes to nothing."""
    nearest = sorted(fits, key=lambda fit: abs(math.log(fit.strength / strength)))[:2]
    if len(nearest) < 2:
        return nearest[0].model if nearest else None
    near, far = nearest
    share = math.log(strength / near.strength) / math.log(far.strength / near.strength)
    return near.model.toward(far.model, share)


def _mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def _check_widths(*splits: Split) -> None:
    widths = [split.features_ND.shape[1] for split in splits]
    if len(set(widths)) > 1:
        raise UserError(f"splits have features of different widths, {widths}: they are of different models")
