"""Write down when a process first reaches the functions named here: Python runs this at start where it is on the path.

A line a moment, `SECONDS PID CPU_SECONDS MOMENT`, is appended to the file that RAYCLIP_START_MARKS names. Nothing of
the code that is measured is changed, so that a release is measured as it was.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

_FILE = os.environ.get("RAYCLIP_START_MARKS")

_WATCHED = {
    "rayclip.config.loader": ["load"],
    "ray._private.worker": ["init"],
    "rayclip.tracking.mlflow": ["open_run"],
    "ray.train.v2.api.data_parallel_trainer": ["DataParallelTrainer.fit"],
    "rayclip.orchestration.worker": ["train_worker"],
    "rayclip.orchestration.train.worker": ["train_worker"],
    "rayclip.training.loop": ["Trainer.run", "Trainer._step"],
    "rayclip.inference.encoder": ["Encoder.encode_pooled"],
}
"""Functions by module, as both this release and the last have them; a module that is not there is never imported."""


def _mark(moment: str) -> None:
    file = os.open(str(_FILE), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{time.time():.3f} {os.getpid()} {time.process_time():.3f} {moment}\n".encode())
    os.close(file)


def _watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    reached: set[str] = set()

    def mark(moment: str) -> None:
        if moment not in reached:
            reached.add(moment)
            _mark(f"{name}:{moment}")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        mark("begin")
        try:
            return function(*args, **kwargs)
        finally:
            mark("end")

    return call


def _watch(module: ModuleType) -> None:
    for path in _WATCHED[module.__name__]:
        *owner, name = path.split(".")
        holder: Any = functools.reduce(getattr, owner, module)
        setattr(holder, name, _watched(getattr(holder, name), path))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules where everybody else does, and wraps their functions once they are loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in _WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _watch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _FILE:
    _mark("python:begin")
    sys.meta_path.insert(0, _Finder())
