"""Whether a model is as often right as it says, and what it takes for what, in numbers and as pictures.

Shapes: N pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rayclip.errors import UserError
from rayclip.evaluation.metrics import wilson_interval
from rayclip.io.figures import png_figure
from rayclip.io.paths import StoragePath

_INK, _FAINT, _RIGHT, _WRONG = "#1f2328", "#8c959f", "#0969da", "#cf222e"
_NAME_LETTERS = 28


@dataclass(frozen=True)
class Bin:
    """Pictures whose confidence is in (low, high], their mean confidence, and the share that is right, with Wilson's
    interval."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class Confusion:
    """A class taken for another: by index, how many pictures, what share of the class's, and rows of some of them."""

    label: int
    answer: int
    count: int
    share: float
    rows: tuple[int, ...]


def reliability(confidence_N: Tensor, right_N: Tensor, num_bins: int = 15) -> list[Bin]:
    """The bins that hold pictures: equal parts (a, b] of confidence.

    `confidence_N` is the probability of each answer, `right_N` bool. Raises UserError without pictures.
    """
    if len(confidence_N) != len(right_N) or not len(right_N):
        raise UserError(f"calibration needs pictures with answers, got {len(confidence_N)} and {len(right_N)}")
    bin_N = ((confidence_N.double() * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    return [
        _bin(index, num_bins, confidence_N[bin_N == index].double(), right_N[bin_N == index])
        for index in bin_N.unique().tolist()
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """How far confidence stands from accuracy (Guo et al. 2017): the gap of each bin, weighted by its pictures."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / total


def _bin(index: int, num_bins: int, confidence_N: Tensor, right_N: Tensor) -> Bin:
    count, right = len(right_N), int(right_N.sum())
    interval = wilson_interval(right, count)
    return Bin(index / num_bins, (index + 1) / num_bins, count, float(confidence_N.mean()), right / count, *interval)


def confusions(
    labels_N: Tensor, answers_N: Tensor, num_classes: int, most: int = 10, examples: int = 3
) -> list[Confusion]:
    """The pairs of (true class, answer) that most pictures are wrong by; of equal counts the lower indices first."""
    wrong_N = (labels_N != answers_N).nonzero().flatten()
    pair_N = labels_N[wrong_N].long() * num_classes + answers_N[wrong_N].long()
    pairs, counts = pair_N.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most]
    found = []
    for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True):
        label, answer = divmod(pair, num_classes)
        rows = wrong_N[pair_N == pair][:examples].tolist()
        found.append(Confusion(label, answer, count, count / int((labels_N == label).sum()), tuple(rows)))
    return found


def write_reliability(path: StoragePath, bins: Sequence[Bin]) -> None:
    """A PNG of accuracy over confidence, with intervals, and of how many pictures stand where."""
    with png_figure(path, 6, 6.5) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        confidence, accuracy = [one.confidence for one in bins], [one.accuracy for one in bins]
        spread = [[b.accuracy - b.accuracy_low for b in bins], [b.accuracy_high - b.accuracy for b in bins]]
        above.plot([0, 1], [0, 1], "--", color=_FAINT, label="as often right as it says")
        above.errorbar(
            confidence, accuracy, spread, fmt="o-", color=_RIGHT, capsize=2, label="the model, 95% intervals"
        )
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"calibration error {calibration_error(bins):.3f}")
        above.legend(fontsize=8, loc="upper left")
        below.bar([one.low for one in bins], [one.count for one in bins], [one.high - one.low for one in bins],
                  align="edge", color=_FAINT, edgecolor="white")  # fmt: skip
        below.set(xlabel="confidence", ylabel="pictures")


def write_confusions(path: StoragePath, found: Sequence[Confusion], class_names: Sequence[str]) -> None:
    """A PNG of the confusions as bars, the most frequent on top, each with its share of the class's pictures.

    Raises UserError where there are none.
    """
    if not found:
        raise UserError("nothing is confused: every answer is right")
    with png_figure(path, 8, 1.2 + 0.34 * len(found)) as figure:
        axes = figure.subplots()
        places = range(len(found))
        axes.barh(places, [one.count for one in found], color=_WRONG, alpha=0.7)
        names = [f"{_short(class_names[one.label])} → {_short(class_names[one.answer])}" for one in found]
        # Names are no formulas: a dollar sign is one.
        axes.set_yticks(places, names, parse_math=False)
        axes.invert_yaxis()
        for place, one in zip(places, found, strict=True):
            axes.text(one.count, place, f" {one.count} ({one.share:.0%})", va="center", color=_INK, fontsize=8)
        axes.margins(x=0.15)
        axes.set(xlabel="pictures", title="true class → answer, with the share of the class's pictures")


def _short(name: str) -> str:
    text = " ".join(name.split())
    return text if len(text) <= _NAME_LETTERS else f"{text[: _NAME_LETTERS // 2]}…{text[-_NAME_LETTERS // 2 + 1 :]}"
