"""Logistic regression with an L2 penalty, solved many times on the same features: what a linear probe is.

The features' principal axes are found once. On them a diagonal stands in for the Hessian at every strength of the
penalty: L-BFGS starts from it. Scores are linear in the weights, so a line search costs no product with the
features; a step costs two.

Shapes: N samples, D features, C classes; K principal axes and the constant, M the features and the constant.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.errors import UserError
from rayclip.evaluation.zero_shot import check_labels

TOLERANCE = 1e-4
"""scikit-learn's own, of the same measure."""
MAX_ITERATIONS = 1000

_MEMORY = 20
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

    def toward(self, other: "LinearModel", share: float) -> "LinearModel":
        """The model at a share of the way to another; outside of 0..1, beyond either."""
        weight_DC = torch.lerp(self.weight_DC, other.weight_DC, share)
        return LinearModel(weight_DC, torch.lerp(self.bias_C, other.bias_C, share))


@dataclass(frozen=True)
class Fit:
    """A solution: `gradient` is the largest entry of the mean loss's gradient, `loss` the sum with its penalty."""

    strength: float
    model: LinearModel
    loss: float
    gradient: float
    iterations: int


class LogisticRegression:
    """The sum of the samples' losses plus strength / 2 times the squared weights; the bias is free.

    It is scikit-learn's with C = 1 / strength, two classes included, which are one sigmoid there. Targets are class
    indices [N], for a softmax over `num_classes`, or bool [N, C], for C sigmoids. The work is done on the features'
    device. It holds the features as they are, and while it fits about 24 bytes a score.

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
        self._features_ND = features_ND
        self._mean_D, self._axes_DK, self._variance_K1 = _principal_axes(features_ND.double())

    def fit(self, strength: float, start: LinearModel | None = None, tolerance: float = TOLERANCE) -> Fit:
        """Solve for one strength, from another's solution if there is one.

        It ends where no entry of the gradient of the mean loss is above `tolerance`, which is how scikit-learn measures
        it, or after MAX_ITERATIONS. What float32 is not precise enough for is done in float64.
        """
        if not strength > 0:
            raise UserError(f"the strength of a penalty must be above 0, got {strength}")
        theta_MC, enough = self._first(start), max(tolerance, self._rounding)
        problem = self._problem(strength, torch.float32)
        point, used = _descend(problem, problem.at(theta_MC.float()), enough, MAX_ITERATIONS)
        if enough > tolerance:
            problem = self._problem(strength, torch.float64)
            # A start that is exact already would lose by its way through float32.
            best = min((problem.at(theta) for theta in (theta_MC, point.theta_MC.double())), key=_size)
            point, more = _descend(problem, best, tolerance, MAX_ITERATIONS - used)
            used += more
        return Fit(strength, self._model(point.theta_MC.double()), problem.loss(point), point.size, used)

    def _model(self, theta_MC: Tensor) -> LinearModel:
        weight_DC = theta_MC[:-1]
        bias_C = theta_MC[-1] - self._mean_D @ weight_DC
        # A softmax does not see what all classes have in common.
        return LinearModel(weight_DC, bias_C - bias_C.mean() if self._link is _softmax else bias_C)

    def _first(self, start: LinearModel | None) -> Tensor:
        """Weights, and the bias for centred features."""
        if start is None:
            return self._mean_D.new_zeros(len(self._mean_D) + 1, self.num_classes)
        return torch.cat([start.weight_DC, (start.bias_C + self._mean_D @ start.weight_DC)[None]])

    def _problem(self, strength: float, dtype: torch.dtype) -> "_Problem":
        return _Problem(
            self._features_ND.to(dtype),
            self._target_NC.to(dtype),
            self._mean_D.to(dtype),
            self._axes_DK.to(dtype),
            self._variance_K1.to(dtype),
            strength * self._penalty_scale,
            self._link,
        )

    @property
    def _rounding(self) -> float:
        """About what float32 makes of a gradient of the mean loss that is zero."""
        squares = self._variance_K1.sum() / len(self._target_NC) + self._mean_D.square().sum()
        return _FLOAT32_SHARE * float(squares) ** 0.5


class _Point(NamedTuple):
    """Weights with what is known of them."""

    theta_MC: Tensor
    logits_NC: Tensor
    residual_NC: Tensor
    gradient_MC: Tensor
    size: float
    """The largest entry of the gradient of the mean loss, in the features and the bias as they were given."""


@dataclass(frozen=True)
class _Problem:
    """The loss for one strength, in one precision. The last row of the weights is the bias for centred features."""

    features_ND: Tensor
    target_NC: Tensor
    mean_D: Tensor
    axes_DK: Tensor
    variance_K1: Tensor
    penalty: float
    link: Callable[[Tensor], Tensor]

    def at(self, theta_MC: Tensor) -> _Point:
        logits_NC = self.logits(theta_MC)
        return self.point(theta_MC, logits_NC, self.link(logits_NC) - self.target_NC)

    def logits(self, theta_MC: Tensor) -> Tensor:
        return torch.addmm(theta_MC[-1] - self.mean_D @ theta_MC[:-1], self.features_ND, theta_MC[:-1])

    def point(self, theta_MC: Tensor, logits_NC: Tensor, residual_NC: Tensor) -> _Point:
        weight_DC = (self.features_ND.T @ residual_NC).add_(theta_MC[:-1], alpha=self.penalty)
        bias_C = residual_NC.sum(dim=0)
        size = float(torch.maximum(weight_DC.abs().max(), bias_C.abs().max())) / len(residual_NC)
        gradient_MC = torch.cat([weight_DC.addr_(self.mean_D, bias_C, alpha=-1), bias_C[None]])
        return _Point(theta_MC, logits_NC, residual_NC, gradient_MC, size)

    def inverse_curvature(self, point: _Point) -> Tensor:
        """An inverse of the Hessian's diagonal on the axes, [K, 1], as if p (1 - p) were the same for all samples and
        classes.

        The same for all classes, because a softmax's gradient sums to zero over them, and steps must too: along what
        all classes have in common there is no curvature.
        """
        probability_NC = point.residual_NC + self.target_NC
        mean = _dot(probability_NC, 1 - probability_NC) / probability_NC.numel()
        curvature_K1 = mean.clamp(min=1e-7) * self.variance_K1
        curvature_K1[:-1] += self.penalty
        return 1 / curvature_K1

    def precondition(self, gradient_MC: Tensor, inverse_K1: Tensor) -> Tensor:
        """That inverse times a gradient."""
        along_KC = (self.axes_DK.T @ gradient_MC[:-1]).mul_(inverse_K1[:-1])
        return torch.cat([self.axes_DK @ along_KC, gradient_MC[-1:] * inverse_K1[-1]])

    def loss(self, point: _Point) -> float:
        if self.link is torch.sigmoid:
            losses = F.softplus(point.logits_NC).sum()
        else:
            losses = point.logits_NC.logsumexp(dim=1).sum()
        return float(losses - _dot(point.logits_NC, self.target_NC) + self._penalty(point.theta_MC, point.theta_MC) / 2)

    def _penalty(self, left_MC: Tensor, right_MC: Tensor) -> Tensor:
        return self.penalty * _dot(left_MC[:-1], right_MC[:-1])

    def step(self, point: _Point, direction_MC: Tensor) -> _Point | None:
        """Go along a direction to about the minimum; None where rounding hides it."""
        slope_at_0 = float(_dot(point.gradient_MC, direction_MC))
        if not slope_at_0 < 0:
            return None
        along_NC = self.logits(direction_MC)
        penalty, curvature = (float(self._penalty(x, direction_MC)) for x in (point.theta_MC, direction_MC))
        line = _Line(slope_at_0)
        for _ in range(_MAX_TRIALS):
            logits_NC = torch.add(point.logits_NC, along_NC, alpha=line.at)
            residual_NC = self.link(logits_NC).sub_(self.target_NC)
            if line.accepts(float(_dot(residual_NC, along_NC)) + penalty + line.at * curvature):
                theta_MC = torch.add(point.theta_MC, direction_MC, alpha=line.at)
                return self.point(theta_MC, logits_NC, residual_NC)
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
        if point.size <= tolerance:
            return point, iteration
        moved = problem.step(point, -_newton_step(problem, point, history))
        if moved is None:
            return point, iteration
        history.append((moved.theta_MC - point.theta_MC, moved.gradient_MC - point.gradient_MC))
        point = moved
    return point, max_iterations


def _size(point: _Point) -> float:
    return point.size


def _newton_step(problem: _Problem, point: _Point, history: deque[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian, as the last steps show it, times the gradient."""
    result_MC, shares = point.gradient_MC.clone(), []
    for step, change in reversed(history):
        share = _dot(step, result_MC) / _dot(step, change)
        result_MC -= share * change
        shares.append(share)
    result_MC = problem.precondition(result_MC, problem.inverse_curvature(point))
    for (step, change), share in zip(history, reversed(shares), strict=True):
        result_MC += (share - _dot(change, result_MC) / _dot(step, change)) * step
    return result_MC


def _principal_axes(features_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [D], the axes [D, K-1] of the centred samples, and their sums of squares on them, [K, 1]; the last of K
    is a constant. From fewer samples than features they are those along which the samples vary at all: solutions have
    nothing on others."""
    num, width = features_ND.shape
    mean_D = features_ND.mean(dim=0)
    if num < width:
        _, spread_K, axes_KD = torch.linalg.svd(features_ND - mean_D, full_matrices=False)
        kept_K = spread_K > spread_K.max() * torch.finfo(torch.float64).eps * width
        axes_DK, variance_K = axes_KD[kept_K].T, spread_K[kept_K].square()
    else:
        variance_K, axes_DK = torch.linalg.eigh((features_ND.T @ features_ND).addr_(mean_D, mean_D, alpha=-num))
        variance_K = variance_K.clamp(min=float(variance_K.max()) * torch.finfo(torch.float64).eps * num)
    return mean_D, axes_DK, torch.cat([variance_K, variance_K.new_tensor([num])])[:, None]


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
