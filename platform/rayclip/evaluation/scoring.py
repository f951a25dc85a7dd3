"""Zero-shot answers to a data set, a part of its features at a time, and the figures that they come to.

What is kept of a picture is a handful of numbers; all its scores only where the data set's own metric needs them.

Shapes: N pictures, C classes, T templates, P prompts, E embedding.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rayclip.errors import UserError
from rayclip.evaluation import metrics
from rayclip.evaluation.features import LabelledFeatures
from rayclip.evaluation.paired import gain_over_best, paired_gain
from rayclip.evaluation.zero_shot import check_labels, rank_of_label
from rayclip.inference.zero_shot import mean_of_prompts

_CHUNK = 2048
_RESAMPLES = 200
_Z = 1.959963984540054


class Figure(NamedTuple):
    """A value with its 95% interval; None where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Answers:
    """What a model answers to N pictures, each of one class."""

    ids: list[str]
    label_N: Tensor
    answer_N: Tensor
    rank_N: Tensor
    """How many classes stand before the true one."""
    confidence_N: Tensor
    """The probability of the answer."""
    template_correct_TN: Tensor
    """Whether each template alone answers right."""
    scores_NC: Tensor | None
    """Cosines, where they were asked for."""

    @property
    def correct(self) -> Tensor:
        """Whether the answer is right, bool [N]."""
        return self.rank_N == 0


@dataclass(frozen=True)
class Scores:
    """Cosines [N, C] and targets, bool [N, C], of a data set whose pictures have any number of classes."""

    scores_NC: Tensor
    targets_NC: Tensor


def answer(
    parts: Iterable[LabelledFeatures],
    prompts_PE: Tensor,
    rows_TC: list[list[int]],
    logit_scale: float,
    keep_scores: bool,
) -> Answers:
    """Classify every picture by the ensemble and by each template alone; prompts as `class_prompts` lists them.

    Raises UserError for a label that is no class, and where there are no pictures.
    """
    classes_CE = mean_of_prompts(prompts_PE, rows_TC)
    alone_TC = [prompts_PE[rows] for rows in rows_TC]
    ids: list[str] = []
    columns: list[tuple[Tensor, ...]] = []
    for part in parts:
        check_labels(part.labels, len(classes_CE))
        ids += part.ids
        for features, labels in zip(part.features_NE.split(_CHUNK), part.labels.split(_CHUNK), strict=True):
            columns.append(_answer(features, labels, classes_CE, alone_TC, logit_scale, keep_scores))
    if not ids:
        raise UserError("no pictures to classify: the split is empty")
    label, best, rank, confidence, correct_NT, scores = (torch.cat(column) for column in zip(*columns, strict=True))
    return Answers(ids, label, best, rank, confidence, correct_NT.T, scores if keep_scores else None)


def right_answers(parts: Iterable[LabelledFeatures], classes_CE: Tensor) -> Tensor:
    """Whether each picture's class is the nearest, bool [N]. Raises UserError where there are no pictures."""
    found = [
        rank_of_label(features @ classes_CE.T, labels) == 0
        for part in parts
        for features, labels in zip(part.features_NE.split(_CHUNK), part.labels.split(_CHUNK), strict=True)
    ]
    if not found:
        raise UserError("no pictures to classify: the split is empty")
    return torch.cat(found)


def score(parts: Iterable[LabelledFeatures], classes_CE: Tensor) -> Scores:
    """Every picture's score for every class, for metrics of several classes a picture."""
    found = [(part.features_NE @ classes_CE.T, part.targets(len(classes_CE))) for part in parts]
    if not found:
        raise UserError("no pictures to classify: the split is empty")
    scores, targets = (torch.cat(column) for column in zip(*found, strict=True))
    return Scores(scores, targets)


def _answer(
    features_NE: Tensor, label_N: Tensor, classes_CE: Tensor, alone_TC: list[Tensor], scale: float, keep: bool
) -> tuple[Tensor, ...]:
    scores_NC = features_NE @ classes_CE.T
    rank_N = rank_of_label(scores_NC, label_N)
    confidence_N, best_N = (scale * scores_NC).softmax(dim=1).max(dim=1)
    correct_NT = torch.stack([rank_of_label(features_NE @ alone.T, label_N) == 0 for alone in alone_TC], dim=1)
    return label_N, best_N, rank_N, confidence_N, correct_NT, scores_NC if keep else scores_NC[:, :0]


def check_classes(answers: Answers, class_names: tuple[str, ...]) -> None:
    """Raise UserError where a class of the list has no picture."""
    counts_C = torch.bincount(answers.label_N, minlength=len(class_names))
    empty = (counts_C == 0).nonzero().flatten().tolist()
    if empty:
        others = f", and {len(empty) - 1} others have none" if len(empty) > 1 else ""
        name = class_names[empty[0]]
        raise UserError(
            f"class {empty[0]} '{name}' has no picture{others}: the class list is of other data, "
            f"or set allow_empty_classes"
        )


def figures(answers: Answers, num_classes: int) -> dict[str, Figure]:
    """Top-1, top-5, their mean, and the mean over classes that have pictures, each with its interval."""
    found = {f"top{k}": share(answers.rank_N < k) for k in (1, 5)}
    both = (found["top1"].value + found["top5"].value) / 2
    per_sample_N = ((answers.rank_N < 1).double() + (answers.rank_N < 5).double()) / 2
    found["mean_top1_top5"] = Figure(both, *mean_difference(per_sample_N)[1:])
    found["mean_per_class"] = _mean_per_class(answers, num_classes)
    if num_classes == 2 and answers.scores_NC is not None:
        found["roc_auc"] = _roc_auc(answers.scores_NC, answers.label_N)
    return found


def multi_label_figures(scores: Scores) -> dict[str, Figure]:
    """Both kinds of mean average precision."""
    kinds = {"eleven_point_map": metrics.eleven_point_map, "mean_ap": metrics.multi_label_map}
    return {name: _of_scores(scores, metric) for name, metric in kinds.items()}


def _of_scores(scores: Scores, metric: Callable[[Tensor, Tensor], float]) -> Figure:
    return _resampled(lambda rows: metric(scores.scores_NC[rows], scores.targets_NC[rows]), len(scores.scores_NC))


def share(right_N: Tensor) -> Figure:
    """The share of those that are right, with Wilson's interval."""
    return share_of(int(right_N.sum()), len(right_N))


def share_of(count: int, total: int) -> Figure:
    """Return the share of `count` in `total`, with Wilson's interval."""
    return Figure(count / total, *metrics.wilson_interval(count, total))


def mean_difference(difference_N: Tensor) -> Figure:
    """The mean of paired differences, with the interval of the normal distribution."""
    values = difference_N.double()
    half = _Z * float(values.std(correction=0)) / len(values) ** 0.5
    return Figure(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def template_report(answers: Answers, templates: tuple[str, ...]) -> dict[str, Any]:
    """What each template is worth alone, and what the ensemble of them gains, in shares of right answers.

    Gains are of the same pictures: over the first template, over the best, and over a template on average.
    """
    alone_TN, ensemble_N = answers.template_correct_TN, answers.correct
    best = gain_over_best(ensemble_N, alone_TN)
    return {
        "alone": [
            {"template": template, "top1": share(right)._asdict()}
            for template, right in zip(templates, alone_TN, strict=True)
        ],
        "ensemble": share(ensemble_N)._asdict(),
        "gain_over_first": asdict(paired_gain(ensemble_N, alone_TN[0])),
        "gain_over_best": {"value": best.gain, "low": best.low, "high": best.high, "template": templates[best.index]},
        "gain_over_mean": mean_difference(ensemble_N.double() - alone_TN.double().mean(dim=0))._asdict(),
    }


def _mean_per_class(answers: Answers, num_classes: int) -> Figure:
    """Over the classes that have pictures; the interval takes the classes as given and their pictures as drawn."""
    counts_C = torch.bincount(answers.label_N, minlength=num_classes).double()
    right_C = torch.bincount(answers.label_N[answers.correct], minlength=num_classes).double()
    right_C, counts_C = right_C[counts_C > 0], counts_C[counts_C > 0]
    share_C = right_C / counts_C
    mean = float(share_C.mean())
    # Without bias where a class has two pictures or more; of one picture alone, the spread of all.
    spread_C = torch.where(counts_C > 1, share_C * (1 - share_C) / (counts_C - 1).clamp(min=1), mean * (1 - mean))
    half = _Z * float(spread_C.sum().sqrt()) / len(share_C)
    return Figure(mean, max(0.0, mean - half), min(1.0, mean + half))


def _roc_auc(scores_N2: Tensor, label_N: Tensor) -> Figure:
    margin_N, positive_N = scores_N2[:, 1] - scores_N2[:, 0], label_N == 1
    return _resampled(lambda rows: metrics.roc_auc(margin_N[rows], positive_N[rows]), len(label_N))


def _resampled(metric: Callable[[Tensor], float], num_samples: int) -> Figure:
    """With the interval of a bootstrap over pictures; a draw that leaves a class empty is not counted."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(_RESAMPLES):
        try:
            drawn.append(metric(torch.randint(num_samples, (num_samples,), generator=generator)))
        except UserError:
            continue
    value = metric(torch.arange(num_samples))
    if len(drawn) < _RESAMPLES / 2:
        return Figure(value)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Figure(value, float(low), float(high))
