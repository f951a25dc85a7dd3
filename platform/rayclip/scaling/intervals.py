"""How far a law may be off: fits to made-up runs, as others that had been trained would have given them.

Noise is drawn anew about the law of all runs, from what they are off it; the frontier is selected again, and fitted.
How far off such a law is, is what noise does to a law; where runs are there because their error is small, it holds what
their luck does. Ours less that is a law that may have given ours (the basic bootstrap: Davison and Hinkley, Bootstrap
Methods and their Application, 1997). It is taken off the logarithm of the error at each run, and the form fitted again:
there fits are nearly linear in the noise, while a limit, an exponent and a coefficient moved by themselves make a law
that fits nothing. Few runs tell the noise badly: percentiles are taken as far out as Student's t is beyond the normal
distribution.

That takes all runs to scatter about one law, and by the same noise: where noise grows or falls with compute, intervals
of a limit, and of errors where noise is largest, hold the truth less often than they say. Where some are worse than
others by more than noise (too small a model for its compute, say), the frontier's lie closer to their law than noise
would leave them: this is tested, and then runs are resampled after all (pairs). Their percentiles are too narrow by the
share of residuals that are not free, and are taken further out for it (Hesterberg, What Teachers Should Know About the
Bootstrap, 2015).

Shapes: R resamples, N runs, K parameters.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from rayclip.config import FitConfig, Frontier
from rayclip.scaling.forms import Form, fit_many, fit_one
from rayclip.scaling.frontier import Selection, select

CONFIDENCE = 0.95
_WORSE_P = 0.05
_LEAST_AXIS = 1e-6  # below which parameters cannot be told apart
_LEAST_FREE = 0.05  # of a run, where the law goes wherever it does


@dataclass(frozen=True)
class Spread:
    """What a law's parameters may be: resamples [R, K], some of them NaN, and the share of them beyond each end of an
    interval. Where noise was drawn anew, their middle is the law without what selection did to it.
    """

    resampled_RK: np.ndarray
    tail: float
    redrawn: bool = False


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
    index_RN = np.random.default_rng(config.seed).integers(0, len(runs.error_N), (count, len(runs.error_N)))
    return _redraw(form, runs, theta_1K, huber, index_RN) or _resample(form, runs, theta_1K, huber, index_RN)


def tail_probability(num_free: int, stretch: float = 1.0) -> float:
    """Share of resamples beyond each end of an interval: less than 2.5% where few residuals are free to tell the noise,
    and where the resamples must be stretched.
    """
    return float(stats.norm.cdf(-stretch * stats.t.ppf((1 + CONFIDENCE) / 2, num_free)))


def _redraw(form: Form, runs: Runs, theta_1K: np.ndarray, huber: float, index_RN: np.ndarray) -> Spread | None:
    """By noise about the law of all runs, drawn from what they are off it; None where more than noise parts them."""
    every = replace(runs, frontier="all")
    truth_1K = theta_1K if runs.frontier == "all" else fit_one(form, every.select())[0]
    z_1TN = form.coordinates(every.select())
    own_1N, truth_1N = (form.log_error(theta, z_1TN) for theta in (theta_1K, truth_1K))
    slope_NK = form.jacobian(truth_1K, z_1TN)[0][:, -form.num_parameters :]  # a line's limit is none
    noise_RN = _noise(runs.error_N - truth_1N[0], slope_NK)[index_RN]
    frontiers = runs.select(error_RN=truth_1N + noise_RN)
    drawn_RK = fit_many(form, frontiers, truth_1K, huber)
    if runs.frontier != "all" and _is_closer(form, runs, theta_1K, frontiers, drawn_RK, noise_RN):
        return None
    drawn_RN = form.log_error(drawn_RK, np.tile(z_1TN, (len(drawn_RK), 1, 1)))
    mirrored = every.select(error_RN=own_1N - (drawn_RN - truth_1N))
    tail = tail_probability(len(runs.error_N) - form.num_parameters)
    return Spread(fit_many(form, mirrored, drawn_RK, np.inf), tail, redrawn=True)


def _noise(off_N: np.ndarray, slope_NK: np.ndarray) -> np.ndarray:
    """The noise of runs, of what they are off their law: more, by how far the law gave way to each (its leverage)."""
    scaled_NK = slope_NK / np.maximum(np.linalg.norm(slope_NK, axis=0), 1e-300)
    axes_NK, size_K, _ = np.linalg.svd(scaled_NK, full_matrices=False)
    leverage_N = (axes_NK[:, size_K > _LEAST_AXIS] ** 2).sum(axis=1)
    noise_N = off_N / np.sqrt(np.maximum(1 - leverage_N, _LEAST_FREE))
    return noise_N - noise_N.mean()


def _resample(form: Form, runs: Runs, theta_1K: np.ndarray, huber: float, index_RN: np.ndarray) -> Spread:
    """By the runs themselves, drawn anew: as much too close together as residuals are smaller than noise."""
    num_fitted = int(runs.select().weight.sum())
    free = num_fitted - form.num_parameters
    resampled_RK = fit_many(form, runs.select(index_RN), theta_1K, huber)
    return Spread(resampled_RK, tail_probability(free, np.sqrt(num_fitted / free)))


def _is_closer(
    form: Form, runs: Runs, theta_1K: np.ndarray, frontiers: Selection, drawn_RK: np.ndarray, noise_RN: np.ndarray
) -> bool:
    """Whether the frontier's runs lie closer to their law than noise leaves those of made-up runs."""
    closeness_R = _distance(form, frontiers, drawn_RK) / _rms(noise_RN)
    closeness = _distance(form, runs.select(), theta_1K) / noise_RN.std()
    return bool(np.mean(closeness_R <= closeness) < _WORSE_P)


def _distance(form: Form, runs: Selection, theta_RK: np.ndarray) -> np.ndarray:
    """Root of the mean square of what each frontier's runs are off their law, by the free ones."""
    off_RM = form.log_error(theta_RK, form.coordinates(runs)) - runs.error
    free_R = np.maximum(runs.weight.sum(axis=1) - form.num_parameters, 1)
    return np.sqrt((runs.weight * off_RM**2).sum(axis=1) / free_R)


def _rms(values_RN: np.ndarray) -> np.ndarray:
    return np.sqrt((values_RN**2).mean(axis=1))
