"""Memory of windows: it is written over once nobody can see it, and not before."""

import gc

import numpy as np
import pytest
import torch

from rayclip.data import memory
from rayclip.data.memory import reused


@pytest.fixture(autouse=True)
def no_spare():
    memory._spare.clear()


def place(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_with_the_last_view():
    first = reused((4, 8, 8, 3))
    at, view = place(first), first[1:3, :, ::-1]
    view[:] = 7
    del first
    gc.collect()
    other = reused((4, 8, 8, 3))
    other[:] = 0
    assert (view == 7).all()
    del view
    assert place(reused((4, 8, 8, 3))) == at


@pytest.mark.parametrize("hold", [torch.from_numpy, memoryview, lambda a: a.reshape(-1)[5:], lambda a: a[..., ::-1].T])
def test_whoever_holds_it_keeps_it(hold):
    array = reused((6, 6, 3))
    array[:] = 9
    held = hold(array)
    del array
    for _ in range(4):
        reused((6, 6, 3))[:] = 0
    assert (np.asarray(held) == 9).all()


def test_arrow_keeps_it():
    pa = pytest.importorskip("pyarrow")
    held = pa.py_buffer(reused((50,)))
    expected = held.to_pybytes()
    reused((50,))[:] = 255 - expected[0]
    assert held.to_pybytes() == expected


def test_a_larger_window_gets_memory_of_its_own():
    at = place(reused((10,)))
    assert reused((20, 2)).shape == (20, 2)
    smaller = reused((3, 5))
    assert smaller.shape == (3, 5) and smaller.flags.c_contiguous and smaller.flags.writeable
    assert place(smaller) != at
