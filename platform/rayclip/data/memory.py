"""Memory for one window's pictures after another.

A window is so large that the C library would take its memory from the kernel each time and give it back: on a virtual
machine the page faults of that cost as much as a fifth of decoding.
"""

import math
from collections import deque
from collections.abc import Callable

import numpy as np

_spare: deque[np.ndarray] = deque(maxlen=2)
"""Of this process: what is being filled, and what is still being read."""


def reused(shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array with anything in it, in memory of an earlier one that is gone with all views of it, if there is."""
    size = math.prod(shape)
    try:
        memory = _spare.pop()
    except IndexError:
        memory = np.empty(size, dtype=np.uint8)
    return np.asarray(_Loan(memory if memory.size >= size else np.empty(size, dtype=np.uint8)))[:size].reshape(shape)


class _Loan:
    """What every array over the memory holds on to; numpy lets it go with the last of them."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self, keep: Callable[[np.ndarray], None] = _spare.append) -> None:
        keep(self._memory)  # an argument, since names of a module may be gone when Python ends
