"""How far a law may be off: fits to made-up runs, as others that had been trained would have given them.

Where a law is fitted to all runs, these are resampled (pairs). Where it is fitted to a frontier, a run is there because
its error is small, and part of that is luck: resampled runs have the same luck once more, so that their intervals are
too narrow, and stand too low. There the noise is drawn anew about the law of all runs, the frontier selected again and
fitted; what that law comes out as, beside what it was, is the bias of the selection and its spread.

That takes all runs to scatter about one law. Where some are worse than others by more than noise (too small a model for
its compute, say), the frontier's lie closer to their law than noise would leave them: this is tested, and then runs are
resampled after all. Plain percentiles of few runs are too narrow: they are taken as much further out as Student's t and
the free residuals ask for (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, on expanded percentiles).

Shapes: R resamples, N runs, K parameters.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from rayclip.config import FitConfig, Frontier
from rayclip.scaling.forms import Form, fit_many, fit_one
from rayclip.scaling.frontier import Selection, select

CONFIDENCE = 0.95
_WORSE_P = 0.05


@dataclass(frozen=True)
class Spread:
    """What a law's parameters may be: resamples [R, K], some of them NaN, and the share of them beyond each end of an
    interval. `centre_1K` is the law without what selection did to it, where that was made out.
    """

    resampled_RK: np.ndarray
    tail: float
    centre_1K: np.ndarray | None = None


@dataclass(frozen=True)
class Runs:
    """Logarithms of the runs' compute, GMACs and error, [N] each, and how they are selected from."""

    frontier: Frontier
    bins: int
    compute_N: np.ndarray
    gmacs_N: np.ndarray
    error_N: np.ndarray

    def select(self, index_RN: np.ndarray | None = None, error_RN: np.ndarray | None = None) -> Selection:
        """The frontier; of resamples, or of made-up errors."""
        num = 1 if error_RN is None else len(error_RN)
        every_RN = np.tile(np.arange(len(self.error_N)), (num, 1)) if index_RN is None else index_RN
        error = self.error_N if error_RN is None else error_RN
        return select(self.frontier, self.bins, self.compute_N, self.gmacs_N, error, every_RN)


def spread_of(form: Form, runs: Runs, theta_1K: np.ndarray, huber: float, config: FitConfig, count: int) -> Spread:
    """Of the law `theta_1K` fitted to the frontier of `runs` with this bound of Huber's loss; by `count` more fits."""
    if not count:
        return Spread(np.empty((0, theta_1K.shape[1])), 0.0)
    drawn = None if runs.frontier == "all" else _redraw(form, runs, theta_1K, huber, config.seed, count)
    if drawn is not None:
        return drawn
    index_RN = np.random.default_rng(config.seed).integers(0, len(runs.error_N), (count, len(runs.error_N)))
    resampled_RK = fit_many(form, runs.select(index_RN), theta_1K, huber)
    return Spread(resampled_RK, tail_probability(int(runs.select().weight.sum()), form.num_parameters))


def tail_probability(num_fitted: int, num_parameters: int) -> float:
    """Share of resamples beyond each end of an interval: less than 2.5% where few runs are left to tell the noise."""
    free = num_fitted - num_parameters
    reach = np.sqrt(num_fitted / free) * stats.t.ppf((1 + CONFIDENCE) / 2, free)
    return float(stats.norm.cdf(-reach))


def _redraw(form: Form, runs: Runs, theta_1K: np.ndarray, huber: float, seed: int, count: int) -> Spread | None:
    """By noise about the law of all runs, drawn from what they are off it; None where more than noise parts them."""
    every = select("all", 0, runs.compute_N, runs.gmacs_N, runs.error_N, np.arange(len(runs.error_N))[None])
    truth_1K, _ = fit_one(form, every)
    law_1N = form.log_error(truth_1K, form.coordinates(every))
    off_N = (every.error - law_1N)[0]
    noise_N = (off_N - off_N.mean()) * np.sqrt(len(off_N) / (len(off_N) - form.num_parameters))
    noise_RN = noise_N[np.random.default_rng(seed).integers(0, len(off_N), (count, len(off_N)))]
    frontiers = runs.select(error_RN=law_1N + noise_RN)
    drawn_RK = fit_many(form, frontiers, truth_1K, huber)
    closeness_R = _distance(form, frontiers, drawn_RK) / _rms(noise_RN)
    closeness = _distance(form, runs.select(), theta_1K) / _rms(noise_N[None])
    if np.mean(closeness_R <= closeness) < _WORSE_P:
        return None
    middle_1K = np.nanmedian(drawn_RK, axis=0, keepdims=True)
    centre_1K = _within_bounds(form, theta_1K + truth_1K - middle_1K, runs)
    resampled_RK = _within_bounds(form, drawn_RK - middle_1K + centre_1K, runs)
    return Spread(resampled_RK, tail_probability(len(off_N), form.num_parameters), centre_1K)


def _within_bounds(form: Form, theta_RK: np.ndarray, runs: Runs) -> np.ndarray:
    if form.name == "power":  # a line has none
        return theta_RK
    return np.clip(theta_RK, *form.bounds(np.full(len(theta_RK), np.exp(runs.error_N.min()))))


def _distance(form: Form, runs: Selection, theta_RK: np.ndarray) -> np.ndarray:
    """Root of the mean square of what each frontier's runs are off their law, by the free ones."""
    off_RM = form.log_error(theta_RK, form.coordinates(runs)) - runs.error
    free_R = np.maximum(runs.weight.sum(axis=1) - form.num_parameters, 1)
    return np.sqrt((runs.weight * off_RM**2).sum(axis=1) / free_R)


def _rms(values_RN: np.ndarray) -> np.ndarray:
    return np.sqrt((values_RN**2).mean(axis=1))
