"""How well a law foretells: it is fitted below a part of the largest compute, and asked for the runs above."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rayclip.config import FitConfig
from rayclip.scaling.fit import NotEnoughError, fit_law, fitted_runs, logarithms
from rayclip.scaling.frontier import select
from rayclip.scaling.points import Point

HOLDOUT_DIVISORS = (2, 4, 8)


@dataclass(frozen=True)
class Foretold:
    """One held-out run: measured, foretold by the law, and by a straight line of the error over log C.

    `factor` is its compute over the largest that was fitted.
    """

    index: int
    compute: float
    factor: float
    measured: float
    predicted: float
    baseline: float


@dataclass(frozen=True)
class Holdout:
    """Fitted below the largest compute over `divisor`; no runs, and a reason, where that cannot be done."""

    divisor: int
    num_fitted: int
    runs: tuple[Foretold, ...]
    reason: str = ""

    @property
    def error(self) -> float:
        """Mean distance of the foretold from the measured error."""
        return float(np.mean([abs(run.predicted - run.measured) for run in self.runs]))

    @property
    def baseline_error(self) -> float:
        """The same of the straight line."""
        return float(np.mean([abs(run.baseline - run.measured) for run in self.runs]))

    def as_dict(self, names: list[str]) -> dict[str, Any]:
        """Return the hold-out as plain values, for the summary."""
        held_out: dict[str, Any] = {"fitted_below": f"largest/{self.divisor}", "num_fitted": self.num_fitted}
        if self.reason:
            return held_out | {"error": None, "baseline_error": None, "reason": self.reason, "runs": []}
        held_out |= {"error": self.error, "baseline_error": self.baseline_error}
        held_out["nearer_than_baseline"] = self.error < self.baseline_error
        shown = [{"name": names[run.index], **vars(run)} for run in self.runs]
        return held_out | {"runs": [{k: v for k, v in run.items() if k != "index"} for run in shown]}


def hold_out(points: list[Point], config: FitConfig) -> list[Holdout]:
    """A hold-out for each divisor of the largest compute on the frontier; those above are asked for that are on it."""
    asked = _on_frontier(points, config)
    return [_hold_out(points, asked, config, divisor) for divisor in HOLDOUT_DIVISORS] if points else []


def _hold_out(points: list[Point], asked: set[int], config: FitConfig, divisor: int) -> Holdout:
    cut = max(points[i].compute for i in asked) / divisor
    below = [point for point in points if point.compute <= cut]
    try:
        law = fit_law(below, config, num_resamples=0)
    except NotEnoughError as reason:
        return Holdout(divisor, len(below), (), str(reason))
    fitted = [below[i] for i in sorted(fitted_runs(law))]
    slope, at_one = np.polyfit(np.log([p.compute for p in fitted]), [p.error for p in fitted], 1)
    largest = max(point.compute for point in fitted)
    held_out = []
    for i in sorted(asked, key=lambda i: points[i].compute):
        point = points[i]
        if point.compute > cut:
            predicted = law.error_at(point.gmacs, point.samples).value
            assert predicted is not None
            line = float(slope * np.log(point.compute) + at_one)
            held_out.append(Foretold(i, point.compute, point.compute / largest, point.error, predicted, line))
    return Holdout(divisor, law.num_fitted, tuple(held_out))


def _on_frontier(points: list[Point], config: FitConfig) -> set[int]:
    if config.frontier == "all":
        return set(range(len(points)))
    runs = select("pareto", config.bins, *logarithms(points), np.arange(len(points))[None])
    return set(runs.run[runs.weight > 0].tolist())
