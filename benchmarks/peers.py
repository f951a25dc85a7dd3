"""The libraries that benchmarks compare with. They are no dependency of the product: `make peers` adds them."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

from rayclip.errors import UserError

_TORCHVISION_OPS = ("nms", "qnms")


@cache  # the operators' names may be given once
def load_open_clip() -> ModuleType:
    """open_clip, or a UserError that says how to get it."""
    if importlib.util.find_spec("open_clip") is None:
        raise UserError("open_clip is not installed: run make peers")
    _name_torchvision_ops()
    return importlib.import_module("open_clip")


def load_open_clip_data() -> ModuleType:
    """The module with the data pipelines of open_clip's training script."""
    load_open_clip()
    return importlib.import_module("open_clip_train.data")


def load_transformers() -> ModuleType:
    """Hugging Face's transformers, or a UserError that says how to get it."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed: run make peers")
    _name_torchvision_ops()
    return importlib.import_module("transformers")


@cache
def _name_torchvision_ops() -> None:
    # Both import torchvision and call none of its operators; a torchvision built for another torch lacks them and
    # fails to import unless their names exist.
    for name in _TORCHVISION_OPS:
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
