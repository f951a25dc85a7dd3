"""Captions with the lengths that captions have on the web."""

import math
from statistics import NormalDist

import numpy as np

MEDIAN_TOKENS = 11
_SPREAD = 0.78  # of the logarithm: 5% have more than 40 tokens


def captions(count: int, context_length: int = 77) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [count, context_length], zero padded, and lengths int32 [count], start and end included.

    Lengths are evenly spaced quantiles of a log-normal in a fixed random order, so that no draw decides a ratio.
    """
    generator = np.random.default_rng(0)
    normal = NormalDist(math.log(MEDIAN_TOKENS), _SPREAD)
    quantiles = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    lengths = generator.permutation(np.clip(quantiles, 4, context_length).round().astype(np.int32))
    tokens = generator.integers(1, 49_000, (count, context_length), dtype=np.int32)
    tokens[np.arange(context_length) >= lengths[:, None] - 1] = 0
    tokens[:, 0] = 49_406
    tokens[np.arange(count), lengths - 1] = 49_407
    return tokens, lengths
