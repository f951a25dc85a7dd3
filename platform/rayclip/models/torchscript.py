"""The weights of a TorchScript archive, which is how OpenAI publishes its models, without running what is in it.

torch.jit.load would compile the archive's code, and torch.load refuses such archives where it may not run code. Here
the pickle within may name tensors, containers and the archive's own modules, which become plain attributes.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "DoubleStorage": torch.float64,
}


def is_archive(file: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(file: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name. Raises pickle.UnpicklingError where the archive names anything else."""
    with zipfile.ZipFile(file) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        module = _Reader(archive, root).load()
    return dict(_tensors(module, ""))


_Typed = tuple[torch.dtype, torch.UntypedStorage]


class _Module:
    """A module of the archive: its attributes and nothing else."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Reader(pickle.Unpickler):
    """Reads data.pkl; whatever is not named here does not exist."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":
            return lambda value, *_: value  # a list with the type of what is in it
        raise pickle.UnpicklingError(f"a TorchScript archive that names {module}.{name} is not read")

    def persistent_load(self, saved: tuple[str, torch.dtype, str, str, int]) -> _Typed:
        _, dtype, key, _, _ = saved
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        return dtype, self._storages[key]


def _rebuild(saved: _Typed, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    dtype, storage = saved
    # set_ holds the shape against the storage's length.
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def _tensors(module: _Module, prefix: str) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Module):
            found += _tensors(value, f"{prefix}{name}.")
    return found
