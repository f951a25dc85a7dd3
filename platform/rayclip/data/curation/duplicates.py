"""Pictures that are there twice: the same bytes, or nearly the same to look at.

The perceptual hash is pHash: which of the lowest 8 x 8 frequencies of the grey picture are above their median, 64 bits.
Shapes: N pictures; S the side of what is hashed.
"""

from itertools import pairwise

import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HASH_SIDE = 32
"""Side in pixels of the picture that is hashed."""

_LOW = 8
_BITS = 64
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def perceptual_hash(pixels_SS3: np.ndarray) -> int:
    """64 bits of a picture, uint8 [32, 32, 3], which differ in a few where pictures differ in size, quality or tone."""
    spectrum = dctn(pixels_SS3.astype(np.float32) @ _LUMA, norm="ortho")[:_LOW, :_LOW].ravel()
    bits = spectrum > np.median(spectrum[1:])
    bits[0] = False  # brightness says nothing
    return int(np.packbits(bits).view(">u8")[0])


def first_of_each(values_N: np.ndarray) -> np.ndarray:
    """bool [N]: whether a value has not been there before."""
    first = np.zeros(len(values_N), dtype=bool)
    first[np.unique(values_N, return_index=True)[1]] = True
    return first


def first_of_near(hashes_N: np.ndarray, max_distance: int) -> np.ndarray:
    """bool [N]: whether a hash, uint64, is the first of its group.

    Two are in one group where they differ in `max_distance` bits at most, or a chain of others that do joins them.
    """
    unique, first, inverse = np.unique(hashes_N, return_index=True, return_inverse=True)
    a, b = near_pairs(unique, max_distance)
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(len(unique), len(unique)))
    groups = connected_components(graph, directed=False)[1][inverse]
    return first_of_each(groups) if len(first) else np.zeros(0, dtype=bool)


def near_pairs(hashes_N: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (a, b) of different hashes, uint64, that differ in `max_distance` bits at most, a pair maybe twice.

    Cut into one band more than that, two such hashes have a band in common: only within equal bands is compared.
    """
    pairs: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    edges = np.linspace(0, _BITS, max_distance + 2).astype(np.uint64)
    for low, high in pairwise(edges):
        band_N = (hashes_N >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band_N, kind="stable")
        band_N, hash_N = band_N[order], hashes_N[order]
        here, lag = np.arange(len(order)), 0
        while len(here):
            lag += 1  # each with the one `lag` places on, for as long as that has the same band
            here = here[here + lag < len(order)]
            here = here[band_N[here] == band_N[here + lag]]
            near = here[np.bitwise_count(hash_N[here] ^ hash_N[here + lag]) <= max_distance]
            pairs.append((order[near], order[near + lag]))
    a, b = zip(*pairs, strict=True)
    return np.concatenate(a), np.concatenate(b)
