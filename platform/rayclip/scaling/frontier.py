"""Which runs a law is fitted to, for many resamples of them at once.

Shapes: R resamples, N runs, M selected places (N, or a bin each); a place with weight 0 is empty.
"""

from dataclasses import dataclass

import numpy as np

from rayclip.config import Frontier

_ABOVE_LARGEST = 0.1  # decades that the last bin reaches beyond the largest run, as in Cherti et al.


@dataclass(frozen=True)
class Selection:
    """Natural logarithms of what is fitted, [R, M] each, and the index of the run that each place is of."""

    compute: np.ndarray
    gmacs: np.ndarray
    error: np.ndarray
    weight: np.ndarray
    run: np.ndarray

    def rows(self, index: np.ndarray) -> "Selection":
        """The resamples that `index` names."""
        fields = (self.compute, self.gmacs, self.error, self.weight, self.run)
        return Selection(*(field[index] for field in fields))


def select(
    frontier: Frontier, bins: int, compute_N: np.ndarray, gmacs_N: np.ndarray, error: np.ndarray, index_RN: np.ndarray
) -> Selection:
    """The frontier of each resample, `index_RN` naming its runs; of logarithms. The runs' errors are the same for all
    resamples, [N], or each has its own, [R, N].

    `all` takes every run; `pareto` those with less error than every run that cost no more; `bins` the least error in
    each of so many equal bins of log C, at the bin's centre.
    """
    every_RN = np.broadcast_to(error, index_RN.shape[:1] + error.shape[-1:])
    error_RN = np.take_along_axis(every_RN, index_RN, axis=1)
    if frontier == "bins":
        return _bins(bins, compute_N[index_RN], gmacs_N[index_RN], error_RN, index_RN)
    if frontier == "pareto":
        order_RN = np.lexsort((error_RN, compute_N[index_RN]))
        index_RN, error_RN = (np.take_along_axis(values, order_RN, axis=1) for values in (index_RN, error_RN))
    weight_RN = np.ones_like(error_RN)
    if frontier == "pareto":
        least_before = np.minimum.accumulate(error_RN, axis=1)[:, :-1]
        weight_RN[:, 1:] = error_RN[:, 1:] < least_before
    return Selection(compute_N[index_RN], gmacs_N[index_RN], error_RN, weight_RN, index_RN)


def _bins(
    bins: int, compute_RN: np.ndarray, gmacs_RN: np.ndarray, error_RN: np.ndarray, index_RN: np.ndarray
) -> Selection:
    least_R1 = compute_RN.min(axis=1, keepdims=True)
    width_R1 = (compute_RN.max(axis=1, keepdims=True) + _ABOVE_LARGEST * np.log(10) - least_R1) / bins
    bin_RN = np.floor((compute_RN - least_R1) / width_R1).astype(int)
    error_RBN = np.where(bin_RN[:, None] == np.arange(bins)[:, None], error_RN[:, None], np.inf)
    best_RB = error_RBN.argmin(axis=2)
    gmacs_RB, run_RB, least_RB = (np.take_along_axis(v, best_RB, axis=1) for v in (gmacs_RN, index_RN, error_RN))
    filled_RB = np.isfinite(error_RBN.min(axis=2))
    centre_RB = least_R1 + (np.arange(bins) + 0.5) * width_R1
    return Selection(centre_RB, gmacs_RB, least_RB, filled_RB.astype(float), run_RB)
