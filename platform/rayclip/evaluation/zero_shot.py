"""Zero-shot accuracy from counts, which add up over shards of data and over workers.

Shapes: N pictures, C classes, D embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayclip.distributed import reduce_counts
from rayclip.errors import UserError

# Pictures scored at once: with a thousand classes the scores take 16 MB.
_CHUNK = 4096


def rank_of_label(scores_NC: Tensor, labels_N: Tensor) -> Tensor:
    """How many classes stand before the true one, int64 [N]: 0 where the answer is right.

    Equal scores are ordered by class index, so a model that answers the same to everything gets what chance gets.
    A score that is not a number stands before the true class, and a true class that has one behind all others.
    """
    true_N1 = scores_NC.gather(1, labels_N[:, None])
    classes_C = torch.arange(scores_NC.shape[1], device=scores_NC.device)
    # "not <=" and not ">": a comparison with NaN is false, and would put the true class first.
    before = ~(scores_NC <= true_N1) | ((scores_NC == true_N1) & (classes_C < labels_N[:, None]))
    return before.sum(dim=1)


def top_k_correct(scores_NC: Tensor, labels_N: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """For each k the number of pictures whose true class is among the k best, int64 [len(ks)].

    k may exceed the number of classes: then every picture counts.
    """
    return _within(rank_of_label(scores_NC, labels_N), ks)


def _within(rank_N: Tensor, ks: Sequence[int]) -> Tensor:
    return torch.stack([(rank_N < k).sum() for k in ks])


class ZeroShotCounts:
    """Right answers at each k, and ranks; `update` a shard at a time, `reduce` over workers, then `metrics`."""

    def __init__(self, class_matrix_CD: Tensor, ks: Sequence[int] = (1, 5)) -> None:
        if not len(class_matrix_CD):
            raise UserError("the list of classes is empty: zero-shot accuracy needs at least one class")
        if not ks or min(ks) < 1:
            raise UserError(f"top-k accuracy needs k of at least 1, got {list(ks)}")
        self.class_matrix_CD = class_matrix_CD
        self.ks = tuple(ks)
        self.correct = torch.zeros(len(ks), dtype=torch.int64)
        self.rank_sum = 0
        self.num_samples = 0

    def update(self, image_features_ND: Tensor, labels_N: Tensor) -> None:
        """Count a shard: features [N, D] and class indices [N]. Raises UserError for a label that is no class."""
        if len(image_features_ND) != len(labels_N):
            raise ValueError(f"{len(image_features_ND)} pictures with {len(labels_N)} labels")
        check_labels(labels_N, len(self.class_matrix_CD))
        device = self.class_matrix_CD.device
        for features, labels in zip(image_features_ND.split(_CHUNK), labels_N.split(_CHUNK), strict=True):
            rank = rank_of_label(features.to(device) @ self.class_matrix_CD.T, labels.long().to(device))
            self.correct += _within(rank, self.ks).cpu()
            self.rank_sum += int(rank.sum())
        self.num_samples += len(labels_N)

    def reduce(self) -> "ZeroShotCounts":
        """The counts of all workers together, the same on each; a new object."""
        total = ZeroShotCounts(self.class_matrix_CD, self.ks)
        counts = reduce_counts(torch.cat([self.correct, torch.tensor([self.rank_sum, self.num_samples])]))
        total.correct, total.rank_sum, total.num_samples = counts[:-2], int(counts[-2]), int(counts[-1])
        return total

    def metrics(self) -> dict[str, float]:
        """`top{k}` and `chance_top{k}` as fractions of 1, `percentile_rank`, `num_classes`, `num_samples`.

        The percentile rank is the mean share of the other classes that the true one stands before: 0.5 is chance (Hu et
        al., 2008, count from the other end). It moves long before accuracy does. Raises UserError without pictures.
        """
        if not self.num_samples:
            raise UserError("no pictures to measure zero-shot accuracy on: the data set is empty")
        num_classes = len(self.class_matrix_CD)
        accuracy = {f"top{k}": int(n) / self.num_samples for k, n in zip(self.ks, self.correct, strict=True)}
        chance = {f"chance_top{k}": min(k, num_classes) / num_classes for k in self.ks}
        percentile_rank = 1 - self.rank_sum / (self.num_samples * max(1, num_classes - 1))
        sizes = {"num_classes": num_classes, "num_samples": self.num_samples}
        return {**accuracy, **chance, "percentile_rank": percentile_rank, **sizes}


def check_labels(labels_N: Tensor, num_classes: int) -> None:
    """Raise UserError where a label is not the index of a class."""
    wrong = ((labels_N < 0) | (labels_N >= num_classes)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"label {int(labels_N[row])} of picture {row} is out of range: "
            f"the class list has {num_classes} classes, 0 to {num_classes - 1}"
        )
