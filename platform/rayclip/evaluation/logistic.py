"""Logistic regression with an L2 penalty, solved many times on the same features: what a linear probe is.

The features are centred and turned into their principal axes once. There a diagonal stands in for the Hessian at every
strength of the penalty: L-BFGS starts from it, and each fit from its neighbour's. Scores are linear in the weights, so
a line search costs no product with the features.

Shapes: N samples, D features, C classes; K principal axes and the constant.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.errors import UserError
from rayclip.evaluation.zero_shot import check_labels

TOLERANCE = 1e-5
MAX_ITERATIONS = 1000

_MEMORY = 10
_MAX_TRIALS = 20
_FLOAT32_SHARE = 1e-6
# A step is taken where the slope has shrunk to this share of what it was, below and above the minimum on the line.
_SLOPE_BELOW, _SLOPE_ABOVE = 0.9, 0.1


@dataclass(frozen=True)
class LinearModel:
    """Scores of C classes from features: float64 weight [D, C] and bias [C]."""

    weight_DC: Tensor
    bias_C: Tensor

    def scores(self, features_ND: Tensor) -> Tensor:
        """[N, C] in the features' own precision: logits of a softmax, or of a sigmoid each if of several labels."""
        return features_ND @ self.weight_DC.to(features_ND.dtype) + self.bias_C.to(features_ND.dtype)


@dataclass(frozen=True)
class Fit:
    """A solution: `gradient` is the longest column of the mean loss's gradient, `loss` the sum with its penalty."""

    strength: float
    model: LinearModel
    loss: float
    gradient: float
    iterations: int


class LogisticRegression:
    """The sum of the samples' losses plus strength / 2 times the squared weights; the bias is free.

    It is scikit-learn's with C = 1 / strength, two classes included, which are one sigmoid there. Targets are class
    indices [N], for a softmax over `num_classes`, or bool [N, C], for C sigmoids. The work is done on the features'
    device. It holds 12 bytes a feature, and while it fits about 24 a score.

    Raises UserError for a label that is no class and for a class without, or a label with nothing but, samples.
    """

    def __init__(self, features_ND: Tensor, targets: Tensor, num_classes: int) -> None:
        _check(features_ND, targets, num_classes)
        self.num_classes = num_classes
        self._link: Callable[[Tensor], Tensor] = torch.sigmoid if targets.ndim == 2 else _softmax
        # Of two rows v / 2 and -v / 2 the squares are half of v's.
        self._penalty_scale = 2.0 if targets.ndim == 1 and num_classes == 2 else 1.0
        target_NC = targets if targets.ndim == 2 else F.one_hot(targets.long(), num_classes)
        self._target_NC = target_NC.float().to(features_ND.device)
        features = features_ND.double()
        self._mean_D = features.mean(dim=0)
        self._axes_DK, self._variance_K1, self._features_NK = _principal_axes(features - self._mean_D)

    def fit(
        self,
        strength: float,
        start: LinearModel | None = None,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
    ) -> Fit:
        """Solve for one strength, from another's solution if there is one, in float32 and at last in float64.

        It ends where no column of the gradient of the mean loss is longer than `tolerance`, or after `max_iterations`.
        """
        if not strength > 0:
            raise UserError(f"the strength of a penalty must be above 0, got {strength}")
        exact, rough = (self._problem(strength, dtype) for dtype in (torch.float64, torch.float32))
        point, enough, used = exact.at(self._first(start)), max(tolerance / 2, self._rounding), 0
        if exact.size(point) > enough:
            roughly, used = _descend(rough, rough.at(point.theta_KC.float()), enough, max_iterations)
            point = exact.at(roughly.theta_KC.double())
        point, more = _descend(exact, point, tolerance, max_iterations - used)
        theta_KC = point.theta_KC
        return Fit(strength, self._model(theta_KC), exact.loss(point), exact.size(point), used + more)

    def _model(self, theta_KC: Tensor) -> LinearModel:
        weight_DC = self._axes_DK @ theta_KC[:-1]
        bias_C = theta_KC[-1] - self._mean_D @ weight_DC
        # A softmax does not see what all classes have in common.
        return LinearModel(weight_DC, bias_C - bias_C.mean() if self._link is _softmax else bias_C)

    def _first(self, start: LinearModel | None) -> Tensor:
        """Weights on the principal axes, and the bias for centred features."""
        if start is None:
            return self._mean_D.new_zeros(len(self._variance_K1), self.num_classes)
        bias_C = start.bias_C + self._mean_D @ start.weight_DC
        return torch.cat([self._axes_DK.T @ start.weight_DC, bias_C[None]])

    def _problem(self, strength: float, dtype: torch.dtype) -> "_Problem":
        penalty_K1 = torch.full_like(self._variance_K1, strength * self._penalty_scale)
        penalty_K1[-1] = 0
        features_NK = self._features_in_float32 if dtype == torch.float32 else self._features_NK
        target_NC, variance_K1 = self._target_NC.to(dtype), self._variance_K1.to(dtype)
        return _Problem(features_NK, target_NC, variance_K1, penalty_K1.to(dtype), self._link)

    @property
    def _rounding(self) -> float:
        """About what float32 makes of a gradient of the mean loss that is zero."""
        return _FLOAT32_SHARE * float(self._variance_K1.sum() / len(self._target_NC)) ** 0.5

    @cached_property
    def _features_in_float32(self) -> Tensor:
        return self._features_NK.float()


class _Point(NamedTuple):
    """Weights with what is known of them."""

    theta_KC: Tensor
    logits_NC: Tensor
    residual_NC: Tensor
    gradient_KC: Tensor


@dataclass(frozen=True)
class _Problem:
    """The loss for one strength, in one precision. The last row of the weights is the bias."""

    features_NK: Tensor
    target_NC: Tensor
    variance_K1: Tensor
    penalty_K1: Tensor
    link: Callable[[Tensor], Tensor]

    def at(self, theta_KC: Tensor) -> _Point:
        logits_NC = self.features_NK @ theta_KC
        return self.point(theta_KC, logits_NC, self.link(logits_NC) - self.target_NC)

    def point(self, theta_KC: Tensor, logits_NC: Tensor, residual_NC: Tensor) -> _Point:
        gradient_KC = (self.features_NK.T @ residual_NC).addcmul_(self.penalty_K1, theta_KC)
        return _Point(theta_KC, logits_NC, residual_NC, gradient_KC)

    def size(self, point: _Point) -> float:
        """How long the gradient of the mean loss is, in its longest column."""
        return float(point.gradient_KC.norm(dim=0).max()) / len(self.target_NC)

    def inverse_curvature(self, point: _Point) -> Tensor:
        """An inverse of the Hessian's diagonal, [K, 1], as if p (1 - p) were the same for all samples and classes.

        The same for all classes, because a softmax's gradient sums to zero over them, and steps must too: along what
        all classes have in common there is no curvature.
        """
        probability_NC = point.residual_NC + self.target_NC
        mean = _dot(probability_NC, 1 - probability_NC) / probability_NC.numel()
        return 1 / (mean.clamp(min=1e-7) * self.variance_K1 + self.penalty_K1)

    def loss(self, point: _Point) -> float:
        if self.link is torch.sigmoid:
            losses = F.softplus(point.logits_NC).sum()
        else:
            losses = point.logits_NC.logsumexp(dim=1).sum()
        return float(losses - _dot(point.logits_NC, self.target_NC) + self._penalty(point.theta_KC, point.theta_KC) / 2)

    def _penalty(self, left_KC: Tensor, right_KC: Tensor) -> Tensor:
        return _dot(left_KC * self.penalty_K1, right_KC)

    def step(self, point: _Point, direction_KC: Tensor) -> _Point | None:
        """Go along a direction to about the minimum; None where rounding hides it."""
        slope_at_0 = float(_dot(point.gradient_KC, direction_KC))
        if not slope_at_0 < 0:
            return None
        along_NC = self.features_NK @ direction_KC
        penalty, curvature = (float(self._penalty(x, direction_KC)) for x in (point.theta_KC, direction_KC))
        line = _Line(slope_at_0)
        for _ in range(_MAX_TRIALS):
            logits_NC = torch.add(point.logits_NC, along_NC, alpha=line.at)
            residual_NC = self.link(logits_NC).sub_(self.target_NC)
            if line.accepts(float(_dot(residual_NC, along_NC)) + penalty + line.at * curvature):
                theta_KC = torch.add(point.theta_KC, direction_KC, alpha=line.at)
                return self.point(theta_KC, logits_NC, residual_NC)
        return None


class _Line:
    """The search along a line of a convex loss, by its slope alone: near the minimum losses differ by less than their
    rounding, slopes do not."""

    def __init__(self, slope_at_0: float) -> None:
        self.at, self._slope_at_0 = 1.0, slope_at_0
        self._low, self._low_slope = 0.0, slope_at_0
        self._high, self._high_slope = float("inf"), float("inf")

    def accepts(self, slope: float) -> bool:
        """Whether the place is good enough for this slope; if not, `at` is the next to try."""
        if _SLOPE_BELOW * self._slope_at_0 <= slope <= -_SLOPE_ABOVE * self._slope_at_0:
            return True
        if slope < 0:
            self._low, self._low_slope = self.at, slope
        else:  # NaN too: a step that overflows is too long
            self._high, self._high_slope = self.at, slope
        if self._high == float("inf"):
            self.at *= 4
        else:
            share = self._low_slope / (self._low_slope - self._high_slope)
            share = min(max(share, 0.1), 0.9) if share == share else 0.1
            self.at = self._low + share * (self._high - self._low)
        return False


def _descend(problem: _Problem, point: _Point, tolerance: float, max_iterations: int) -> tuple[_Point, int]:
    """L-BFGS (Nocedal and Wright 2006, algorithm 7.5): the last point, and the number of steps to it."""
    history: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
    for iteration in range(max_iterations):
        if problem.size(point) <= tolerance:
            return point, iteration
        moved = problem.step(point, -_newton_step(point.gradient_KC, history, problem.inverse_curvature(point)))
        if moved is None:
            return point, iteration
        history.append((moved.theta_KC - point.theta_KC, moved.gradient_KC - point.gradient_KC))
        point = moved
    return point, max_iterations


def _newton_step(gradient_KC: Tensor, history: deque[tuple[Tensor, Tensor]], inverse_K1: Tensor) -> Tensor:
    """The inverse Hessian, as the last steps show it, times the gradient."""
    result_KC, shares = gradient_KC.clone(), []
    for step, change in reversed(history):
        share = _dot(step, result_KC) / _dot(step, change)
        result_KC -= share * change
        shares.append(share)
    result_KC *= inverse_K1
    for (step, change), share in zip(history, reversed(shares), strict=True):
        result_KC += (share - _dot(change, result_KC) / _dot(step, change)) * step
    return result_KC


def _principal_axes(centred_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Axes [D, K-1] along which the samples vary, their sums of squares [K, 1], and the samples on them [N, K]; the
    last of K is a constant."""
    _, spread_K, axes_KD = torch.linalg.svd(torch.linalg.qr(centred_ND, mode="r").R, full_matrices=False)
    kept_K = spread_K > spread_K.max() * torch.finfo(torch.float64).eps * max(centred_ND.shape)
    axes_DK, constant_N1 = axes_KD[kept_K].T, torch.ones_like(centred_ND[:, :1])
    variance_K = torch.cat([spread_K[kept_K].square(), spread_K.new_tensor([len(centred_ND)])])
    return axes_DK, variance_K[:, None], torch.cat([centred_ND @ axes_DK, constant_N1], dim=1)


def _softmax(logits_NC: Tensor) -> Tensor:
    return logits_NC.softmax(dim=1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.dot(left.reshape(-1), right.reshape(-1))


def _check(features_ND: Tensor, targets: Tensor, num_classes: int) -> None:
    if len(features_ND) != len(targets):
        raise UserError(
            f"{len(features_ND)} rows of features with {len(targets)} labels: each sample needs one of both"
        )
    if not features_ND.isfinite().all():
        raise UserError("features hold a value that is not finite: the model or its pictures are broken")
    if num_classes < 2 and targets.ndim == 1:
        raise UserError(f"a probe needs at least 2 classes, got {num_classes}")
    if targets.ndim == 2:
        return _check_multi_label(targets, num_classes)
    check_labels(targets, num_classes)
    empty = (torch.bincount(targets.long(), minlength=num_classes) == 0).nonzero()
    if len(empty):
        raise UserError(f"class {int(empty[0])} of {num_classes} has no samples to fit a probe on")


def _check_multi_label(targets_NC: Tensor, num_classes: int) -> None:
    if targets_NC.shape[1] != num_classes:
        raise UserError(f"targets of {targets_NC.shape[1]} classes, where there are {num_classes}")
    same = (targets_NC == targets_NC[:1]).all(dim=0).nonzero()
    if len(same):
        raise UserError(f"all samples are alike in class {int(same[0])} of {num_classes}: there is nothing to fit")
