"""The metrics of the paper's data sets, from scores: classes are indices throughout, for names may repeat.

Fractions are of 1. Equal scores are one threshold in every curve, so no metric depends on the order of the samples.

Shapes: N pictures, C classes, T distinct scores.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rayclip.errors import UserError
from rayclip.evaluation.zero_shot import check_labels, rank_of_label, top_k_correct


def accuracy(scores_NC: Tensor, labels_N: Tensor, k: int = 1) -> float:
    """The share of pictures whose true class is among the k best."""
    _check_single_label(scores_NC, labels_N)
    if k < 1:
        raise UserError(f"top-k accuracy needs k of at least 1, got {k}")
    return int(top_k_correct(scores_NC, labels_N, (k,))) / len(labels_N)


def mean_of_top1_and_top5(scores_NC: Tensor, labels_N: Tensor) -> float:
    """The metric of Kinetics700."""
    return (accuracy(scores_NC, labels_N, 1) + accuracy(scores_NC, labels_N, 5)) / 2


def mean_per_class(scores_NC: Tensor, labels_N: Tensor) -> float:
    """Each class's own accuracy, averaged over classes. Raises UserError for a class without pictures."""
    _check_single_label(scores_NC, labels_N)
    num_classes = scores_NC.shape[1]
    num_C = torch.bincount(labels_N, minlength=num_classes)
    empty = (num_C == 0).nonzero()
    if len(empty):
        raise UserError(f"class {int(empty[0])} of {num_classes} has no pictures: its accuracy is not defined")
    correct_C = torch.bincount(labels_N[rank_of_label(scores_NC, labels_N) == 0], minlength=num_classes)
    return float((correct_C.double() / num_C).mean())


def multi_label_map(scores_NC: Tensor, targets_NC: Tensor) -> float:
    """Average precision of each class (the area under its steps), averaged. Targets are bool [N, C]."""
    return _mean_over_classes(scores_NC, targets_NC, _average_precision)


def eleven_point_map(scores_NC: Tensor, targets_NC: Tensor) -> float:
    """VOC2007's: a class's best precision at recall of at least 0, 0.1, ... 1, averaged. Targets are bool [N, C]."""
    return _mean_over_classes(scores_NC, targets_NC, _eleven_point_precision)


def roc_auc(scores_N: Tensor, positive_N: Tensor) -> float:
    """The chance that a positive scores above a negative, equal scores counting half. `positive_N` is bool.

    Raises UserError unless there is at least one of each.
    """
    _check_scores(scores_N, len(positive_N))
    num_positive = int(positive_N.sum())
    num_negative = len(positive_N) - num_positive
    if not num_positive or not num_negative:
        raise UserError(f"ROC AUC needs both classes, got {num_positive} positives and {num_negative} negatives")
    _, group_N, size_T = scores_N.unique(return_inverse=True, return_counts=True)
    positive_T = torch.bincount(group_N[positive_N], minlength=len(size_T))
    negative_T = size_T - positive_T
    below_T = negative_T.cumsum(0) - negative_T
    # Twice the count: whole numbers, exact up to 2^63.
    return int((positive_T * (2 * below_T + negative_T)).sum()) / (2 * num_positive * num_negative)


def wilson_interval(num_correct: int, num_samples: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The binomial interval of Wilson (1927) without continuity correction; z = 1.96 gives 95%."""
    if num_samples < 1 or not 0 <= num_correct <= num_samples:
        raise UserError(f"an interval needs 0 <= correct <= samples and a sample, got {num_correct} of {num_samples}")
    share, weight = num_correct / num_samples, z * z / num_samples
    centre = share + weight / 2
    half = math.sqrt(weight * (share * (1 - share) + weight / 4))
    # The bounds at no and at all correct are 0 and 1; rounding must not put the share outside of its interval.
    return min(share, max(0.0, (centre - half) / (1 + weight))), max(share, min(1.0, (centre + half) / (1 + weight)))


def _mean_over_classes(scores_NC: Tensor, targets_NC: Tensor, metric: Callable[[Tensor, Tensor], float]) -> float:
    if scores_NC.shape != targets_NC.shape:
        raise UserError(
            f"scores {list(scores_NC.shape)} with targets {list(targets_NC.shape)}: a target for each score"
        )
    _check_scores(scores_NC, len(targets_NC))
    empty = (~targets_NC.any(dim=0)).nonzero()
    if len(empty):
        raise UserError(f"class {int(empty[0])} of {scores_NC.shape[1]} has no pictures: its precision is not defined")
    values = [metric(*_hits(scores, targets)) for scores, targets in zip(scores_NC.T, targets_NC.T, strict=True)]
    return sum(values) / len(values)


def _hits(scores_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """True positives and all answers at each distinct score from the highest on, int64 [T]."""
    _, group_N, size_T = scores_N.unique(return_inverse=True, return_counts=True)
    positive_T = torch.bincount(group_N[targets_N], minlength=len(size_T))
    return positive_T.flip(0).cumsum(0), size_T.flip(0).cumsum(0)


def _average_precision(true_T: Tensor, answered_T: Tensor) -> float:
    gained_T = true_T.diff(prepend=true_T.new_zeros(1))
    return float((gained_T * true_T.double() / answered_T).sum() / true_T[-1])


def _eleven_point_precision(true_T: Tensor, answered_T: Tensor) -> float:
    precision_T = true_T.double() / answered_T
    # Recall compared in whole numbers: 0.3 as a float would lose the point that recalls 3 of 10.
    return sum(float(precision_T[10 * true_T >= tenth * true_T[-1]].max()) for tenth in range(11)) / 11


def _check_single_label(scores_NC: Tensor, labels_N: Tensor) -> None:
    _check_scores(scores_NC, len(labels_N))
    check_labels(labels_N, scores_NC.shape[1])


def _check_scores(scores: Tensor, num_labels: int) -> None:
    if len(scores) != num_labels:
        raise UserError(f"{len(scores)} rows of scores with {num_labels} labels: each picture needs one of both")
    if not scores.numel():
        raise UserError("no pictures or no classes to measure: the split is empty")
    if not scores.isfinite().all():
        raise UserError("scores hold a value that is not finite: the model or its features are broken")
