"""PyTorch's DistributedDataParallel without the import of torch.compile, more than a second of every worker's start."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module, **settings: Any) -> DistributedDataParallel:
    """Return `model` in DistributedDataParallel; where torch.compile was imported, as where it is used, in its own."""
    if "torch._dynamo" in sys.modules:
        return DistributedDataParallel(model, **settings)
    with _without_compiler():
        return _DataParallel(model, **settings)


class _DataParallel(DistributedDataParallel):
    # PyTorch's own, below a decorator that imports torch.compile in order to be left alone by it.
    _inside_ddp_forward = contextmanager(inspect.unwrap(DistributedDataParallel._inside_ddp_forward))


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Answer the constructor's one question to torch.compile: by default it reduces no gradients in Python."""
    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")
    torch.__dict__["_dynamo"] = SimpleNamespace(utils=utils)
    try:
        yield
    finally:
        del torch.__dict__["_dynamo"]  # whoever asks next gets the real one
