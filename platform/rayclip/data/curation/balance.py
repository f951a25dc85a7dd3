"""CLIP's balance: frequent queries give up most of their pairs, rare ones none.

Of a query with more than t pairs each is kept with probability t / count; a pair that several queries find is kept by
the chance of the rarest. So each query keeps about t of its pairs, beside those that rarer queries keep.

Shapes: N pairs; Q queries; M matches, those of pair n being matches[offsets[n] : offsets[n + 1]].
"""

import numpy as np


def keep_probability(matches_M: np.ndarray, offsets: np.ndarray, counts_Q: np.ndarray, most: int) -> np.ndarray:
    """float64 [N]: how likely each pair is kept; 0 where no query found it."""
    chance_M = np.minimum(1.0, most / np.maximum(counts_Q, 1))[matches_M]
    probability = np.zeros(len(offsets) - 1)
    found = np.diff(offsets) > 0
    if found.any():
        probability[found] = np.maximum.reduceat(chance_M, offsets[:-1][found])
    return probability


def count_pairs(matches_M: np.ndarray, offsets: np.ndarray, keep_N: np.ndarray, num_queries: int) -> np.ndarray:
    """int64 [Q]: how many of the pairs that are kept each query finds."""
    return np.bincount(matches_M[np.repeat(keep_N, np.diff(offsets))], minlength=num_queries)
