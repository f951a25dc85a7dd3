"""A law, how sure it is (by intervals.py), and whether its form is right.

Shapes: R resamples, N runs, M places of a selection, K parameters.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from rayclip.config import FitConfig
from rayclip.scaling.forms import Form, fit_one
from rayclip.scaling.frontier import Selection
from rayclip.scaling.intervals import Runs, Spread, spread_of
from rayclip.scaling.points import Point

_MISFIT_P = 0.01
_LIMIT_P = 0.05
_RISING_P = 0.05
_NO_LIMIT = 1e-6
_LARGEST_RATIO = 5.0  # of an exponent's interval, above which it says nothing


class NotEnoughError(Exception):
    """The runs cannot carry the law; the message says why."""


class RisingError(NotEnoughError):
    """Runs of more compute have more error, which no law says."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval; all None where the runs do not carry one, with the reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Law:
    """A form with its parameters, theta [1, K], and what else they may be."""

    form: Form
    runs: Selection
    theta_1K: np.ndarray
    huber: float
    spread: Spread

    @property
    def num_fitted(self) -> int:
        """Places of the frontier that hold a run."""
        return int(self.runs.weight.sum())

    def estimates(self) -> dict[str, Estimate]:
        """Every figure of the form with its interval."""
        value, resampled = self.form.figures(self.theta_1K), self.form.figures(self.spread.resampled_RK)
        return {name: self._estimate(value[name][0], resampled[name]) for name in value}

    def error_at(self, gmacs: float, samples: float) -> Estimate:
        """The error of a model of so many GMACs after so many samples."""
        runs = _selection(np.log([gmacs * samples]), np.log([gmacs]))
        z = self.form.coordinates(runs)
        resampled_R = np.exp(
            self.form.log_error(self.spread.resampled_RK, np.tile(z, (len(self.spread.resampled_RK), 1, 1)))
        )
        return self._estimate(float(np.exp(self.form.log_error(self.theta_1K, z))[0, 0]), resampled_R[:, 0])

    def best_error(self, compute: float) -> Estimate:
        """The error at the frontier for so much compute: for chinchilla, of the best model and samples."""
        figures, resampled = self.form.figures(self.theta_1K), self.form.figures(self.spread.resampled_RK)
        at, at_R = (f["coefficient"] * (compute + f.get("shift", 0.0)) ** -f["exponent"] + f["limit"]
                    for f in (figures, resampled))  # fmt: skip
        return self._estimate(at[0], at_R)

    def compute_for(self, error: float) -> Estimate:
        """Compute whose best error this is; no value at or below the limit, and an end at infinity where a resample's
        limit lies above the error.
        """
        figures, resampled = self.form.figures(self.theta_1K), self.form.figures(self.spread.resampled_RK)
        at, at_R = (_inverse(f, error) for f in (figures, resampled))
        if not np.isfinite(at[0]):
            return Estimate(None, reason=f"the law's limit is {figures['limit'][0]:.4g}: no compute reaches {error:g}")
        tail = self.spread.tail
        usable_R = at_R[~np.isnan(at_R)]
        low, high = np.quantile(usable_R, [tail, 1 - tail], method="closest_observation")
        return Estimate(float(at[0]), float(low), float(high))

    def best_model(self, compute: float) -> tuple[Estimate, Estimate] | None:
        """GMACs a pair and samples that reach the least error for so much compute; None where the form has no sizes."""
        figures, resampled = self.form.figures(self.theta_1K), self.form.figures(self.spread.resampled_RK)
        if "best_gmacs_exponent" not in figures:
            return None
        gmacs, gmacs_R = (f["best_gmacs_coefficient"] * compute ** f["best_gmacs_exponent"]
                          for f in (figures, resampled))  # fmt: skip
        return self._estimate(gmacs[0], gmacs_R), self._estimate(compute / gmacs[0], compute / gmacs_R)

    def _estimate(self, value: float, resampled_R: np.ndarray) -> Estimate:
        usable_R = resampled_R[np.isfinite(resampled_R)]
        if not len(usable_R):
            return Estimate(float(value))
        tail = self.spread.tail
        low, high = np.quantile(usable_R, [tail, 1 - tail], method="weibull")  # in the mean exact, for any R
        return Estimate(float(value), float(low), float(high))


def _inverse(figures: dict[str, np.ndarray], error: float) -> np.ndarray:
    above = np.where(np.isnan(figures["limit"]), np.nan, np.maximum(error - figures["limit"], 0.0))
    with np.errstate(divide="ignore", over="ignore"):
        compute = (above / figures["coefficient"]) ** (-1 / figures["exponent"])
    return np.maximum(compute - figures.get("shift", 0.0), 0.0)


def fit_law(points: list[Point], config: FitConfig, num_resamples: int | None = None) -> Law:
    """Return the law of these runs. Raises NotEnoughError where they cannot carry one."""
    if not points:
        raise NotEnoughError("not enough points: there are none")
    compute_N, gmacs_N, error_N = logarithms(points)
    _check_falls(compute_N, error_N)
    given = Runs(config.frontier, config.bins, compute_N, gmacs_N, error_N)
    runs = given.select()
    form = Form.of(config.form, runs)
    _check_enough(form, runs)
    theta_1K, huber = fit_one(form, runs)
    count = config.resamples if num_resamples is None else num_resamples
    return Law(form, runs, theta_1K, huber, spread_of(form, given, theta_1K, huber, config, count))


def selection_bias(law: Law) -> float | None:
    """Share by which noise alone puts the frontier's errors below those of the law that all runs scatter about; None
    where runs differ by more than noise.
    """
    if not law.spread.redrawn:
        return None
    kept_M = law.runs.weight[0] > 0
    resampled_RK, z = law.spread.resampled_RK, law.form.coordinates(law.runs)
    right_RM = law.form.log_error(resampled_RK, np.tile(z, (len(resampled_RK), 1, 1)))
    above_M = np.nanmedian(right_RM, axis=0) - law.form.log_error(law.theta_1K, z)[0]
    return float(-np.expm1(-above_M[kept_M].mean()))


def fitted_runs(law: Law) -> set[int]:
    """Indices of the points that the law is fitted to."""
    return set(law.runs.run[law.runs.weight > 0].tolist())


def flags(law: Law) -> list[str]:
    """What is wrong with the law, a line each."""
    found = []
    misfit = misfit_p(law)
    if misfit is not None and misfit < _MISFIT_P:
        found.append(f"misfit: the errors bend away from the form (p = {misfit:.2g})")
    found += [f"bound hit: {name}" for name in _at_bounds(law)]
    for name, estimate in law.estimates().items():
        low, high = estimate.low, estimate.high
        if name.endswith("exponent") and low is not None and high is not None and high > _LARGEST_RATIO * max(low, 0):
            found.append(f"not identifiable: {name} is between {low:.3g} and {high:.3g}")
    limit = law.estimates()["limit"]
    if law.form.name != "power" and limit.value and limit.low is not None and limit.low < _NO_LIMIT:
        found.append("not identifiable: the limit's interval reaches down to 0")
    lost = float(np.isnan(law.spread.resampled_RK).any(axis=1).mean())
    if lost > 0.01:
        found.append(f"{lost:.0%} of the resamples hold too few different runs to be fitted")
    return found


def why_no_limit(law: Law) -> str:
    """Why the law's limit is not to be believed: it has none, or one without fits as well; empty where it is."""
    if law.form.name == "power":
        return "the form has none"
    without_1K, _ = fit_one(law.form, law.runs, limit=False)
    free = law.num_fitted - law.form.num_parameters
    with_limit, without = (float((_residual(law, theta) ** 2).sum()) for theta in (law.theta_1K, without_1K))
    p = float(stats.f.sf(max(without - with_limit, 0.0) / max(with_limit / free, 1e-18), 1, free))
    return f"not enough: a law without a limit fits as well (p = {p:.2g})" if p >= _LIMIT_P else ""


def misfit_p(law: Law) -> float | None:
    """Probability of residuals so bent where the form is right: an F test of the term that it lacks, the next power of
    log C, for chinchilla log N times log D. None where no residual would be left free.
    """
    free = law.num_fitted - law.form.num_parameters - 1
    if free < 1:
        return None
    kept_M = law.runs.weight[0] > 0
    z_TM = law.form.coordinates(law.runs)[0][:, kept_M]
    bend_M = z_TM.prod(axis=0) if len(z_TM) == 2 else z_TM[0] ** law.form.num_parameters
    tangent_MK = law.form.jacobian(law.theta_1K, law.form.coordinates(law.runs))[0][kept_M]
    if law.form.name == "power":
        tangent_MK = tangent_MK[:, 1:]
    residual_M = _residual(law, law.theta_1K)
    straight, bent = (_left_over(residual_M, base)
                      for base in (tangent_MK, np.column_stack([tangent_MK, bend_M])))  # fmt: skip
    return float(stats.f.sf(max(straight - bent, 0.0) / max(bent / free, 1e-18), 1, free))


def _left_over(residual_M: np.ndarray, base_MK: np.ndarray) -> float:
    scaled_MK = base_MK / np.maximum(np.linalg.norm(base_MK, axis=0), 1e-300)
    return float(((residual_M - scaled_MK @ np.linalg.lstsq(scaled_MK, residual_M)[0]) ** 2).sum())


def _residual(law: Law, theta_1K: np.ndarray) -> np.ndarray:
    kept_M = law.runs.weight[0] > 0
    return (law.form.log_error(theta_1K, law.form.coordinates(law.runs)) - law.runs.error)[0][kept_M]


def _at_bounds(law: Law) -> list[str]:
    names = {
        "power_limit": ["limit", "coefficient", "exponent"],
        "shifted_limit": ["limit", "coefficient", "exponent", "shift"],
        "chinchilla": ["limit", "size_coefficient", "size_exponent", "samples_coefficient", "samples_exponent"],
    }.get(law.form.name, [])
    least = np.exp(law.runs.error[law.runs.weight > 0].min())
    lower_1K, upper_1K = law.form.bounds(np.array([least]))
    room_1K = 1e-6 * (upper_1K - lower_1K)
    touched_1K = (law.theta_1K <= lower_1K + room_1K) | (law.theta_1K >= upper_1K - room_1K)
    return [name for name, touched in zip(names, touched_1K[0], strict=False) if touched]


def _check_falls(compute_N: np.ndarray, error_N: np.ndarray) -> None:
    """Raise RisingError where the errors' ranks go up with compute, and not by chance (Kendall, 1938)."""
    if len(compute_N) < 3:
        return
    tau = stats.kendalltau(compute_N, error_N, alternative="greater")
    if tau.pvalue < _RISING_P:
        raise RisingError(
            f"the error rises with compute (rank correlation {tau.statistic:+.2f}, p = {tau.pvalue:.2g}), and a law's "
            "falls: is it an accuracy? The error is one minus that"
        )


def _check_enough(form: Form, runs: Selection) -> None:
    kept = runs.weight[0] > 0
    fitted, needed = int(kept.sum()), form.num_parameters + 2
    if fitted < needed:
        raise NotEnoughError(f"not enough points: {fitted} to fit, {form.name} needs {needed}")
    gmacs, compute = runs.gmacs[0][kept], runs.compute[0][kept]
    if form.name == "chinchilla":
        for what, values in (("models' GMACs", gmacs), ("numbers of samples", compute - gmacs)):
            if (different := _num_different(values)) < 3:
                raise NotEnoughError(f"not enough points: {different} different {what}, chinchilla needs 3")
    elif (different := _num_different(compute)) < form.num_parameters + 1:
        raise NotEnoughError(
            f"not enough points: {different} different amounts of compute, {form.name} needs {form.num_parameters + 1}"
        )


def _num_different(values: np.ndarray) -> int:
    """How many values differ by more than rounding does."""
    return int((np.diff(np.sort(values)) > 1e-3).sum()) + 1


def logarithms(points: list[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Natural logarithms of their compute, GMACs and error, [N] each."""
    values = [(point.compute, point.gmacs, point.error) for point in points]
    compute_N, gmacs_N, error_N = np.log(np.array(values)).T
    return compute_N, gmacs_N, error_N


def _selection(compute_M: np.ndarray, gmacs_M: np.ndarray) -> Selection:
    ones = np.ones((1, len(compute_M)))
    return Selection(compute_M[None], gmacs_M[None], 0 * ones, ones, ones.astype(int))
