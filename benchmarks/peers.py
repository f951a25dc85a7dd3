"""The libraries that benchmarks compare with. They are no dependency of the product: `make peers` adds them."""

import importlib
import importlib.util
from types import ModuleType

from rayclip.errors import UserError


def load_open_clip() -> ModuleType:
    """Return open_clip. Raises UserError, which says how to get it, where it is not installed."""
    return _load("open_clip", "open_clip")


def load_open_clip_data() -> ModuleType:
    """Return the module with the data pipelines of open_clip's training script. Raises UserError likewise."""
    return _load("open_clip_train.data", "open_clip")


def load_transformers() -> ModuleType:
    """Return Hugging Face's transformers. Raises UserError likewise."""
    return _load("transformers", "transformers")


def _load(module: str, package: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed: run make peers")
    return importlib.import_module(module)
