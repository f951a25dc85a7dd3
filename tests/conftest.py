"""What the tests share."""

import importlib
import importlib.util

import pytest
import torch

_TORCHVISION_OPS = ("nms", "qnms")


@pytest.fixture(scope="session")
def open_clip():
    """open_clip, the reference that peer tests compare with."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: run `make peers`")
    # open_clip imports torchvision and calls none of its operators. A torchvision that was built for another torch
    # has none, and then fails to import unless their names at least exist.
    for name in _TORCHVISION_OPS:
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return importlib.import_module("open_clip")
