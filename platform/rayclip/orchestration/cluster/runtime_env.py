"""What travels with a submitted job: the tree of the caller, and the checks that the job will find there what it names.

A job runs in a temporary folder that holds what was shipped, and what it writes there goes with it.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from rayclip.config import Config
from rayclip.config.base import PathMark, TrackingMark
from rayclip.config.fields import MarkedValue, marked_values, marks_in
from rayclip.errors import UserError
from rayclip.orchestration.cluster import ray_internals
from rayclip.orchestration.cluster.ray_internals import JOB_ENVIRONMENT

WORKING_DIR, PY_MODULES = ".", ["platform/rayclip"]
RUNTIME_ENV: dict[str, Any] = {
    "working_dir": WORKING_DIR,  # jobs/ and serve/
    "py_modules": PY_MODULES,  # without this, workers find the installed copy of the library, or none
    "excludes": ["__pycache__/"],
    "env_vars": JOB_ENVIRONMENT,
}
"""What every submitted job runs in; paths are relative to the root of the tree."""

_SHARED = "give an absolute path that all nodes share, or a URI"


@dataclass(frozen=True)
class Shipment:
    """What is uploaded: names relative to the root, and the size of it packed."""

    files: frozenset[str]
    num_bytes: int

    def holds(self, path: str) -> bool:
        """Whether a file, or something in a folder, is shipped."""
        name = Path(path).as_posix()
        return name in self.files or any(file.startswith(f"{name}/") for file in self.files)


def pack(root: Path) -> Shipment:
    """What Ray would upload of the tree, packed by the same code."""
    files: set[str] = set()
    num_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        for i, module in enumerate([WORKING_DIR, *PY_MODULES]):
            package = Path(folder) / f"{i}.zip"
            ray_internals.pack(root / module, package, RUNTIME_ENV["excludes"])
            num_bytes += package.stat().st_size
            with ZipFile(package) as packed:
                files |= {(Path(module) / name).as_posix() for name in packed.namelist()}
    return Shipment(frozenset(files), num_bytes)


def check_config(arguments: list[str], shipment: Shipment) -> None:
    """Raise UserError for a config file that is not in the tree."""
    for argument in arguments:
        if argument.endswith((".yaml", ".yml")) and "=" not in argument and not shipment.holds(argument):
            raise UserError(
                f"config '{argument}' is not in the tree that is shipped: put it into platform/rayclip/recipes"
            )


def check_paths(config: Config, summary: str, shipment: Shipment, root: Path) -> list[str]:
    """The absolute paths that a job reads and writes, which only the cluster can check.

    Raises UserError for one that the job would not find, or whose content would go with the job's temporary folder.
    """
    if not _is_shared(summary):
        raise UserError(_lost(_output_key(type(config)), summary))
    values = marked_values(config)
    _check_tracking(values)
    for key, value, mark in values:
        if isinstance(mark, PathMark) and _is_path(value, mark, root) and not _is_shared(value):
            if mark.access == "write":
                raise UserError(_lost(key, value))
            if mark.access == "read" and not shipment.holds(value):
                raise UserError(f"{key} is '{value}', which is not shipped with the job: {_SHARED}")
    return sorted({value for _, value, mark in values if isinstance(mark, PathMark) and value.startswith("/")})


def _lost(key: str, path: str) -> str:
    return f"the job would write '{path}' into a folder that is removed with it: {key}: {_SHARED}"


def _output_key(schema: type[Config]) -> str:
    """The key that says where a job writes, or the option that says where its summary goes."""
    for key, field in schema.model_fields.items():
        if any(mark.access == "write" for mark in marks_in(field, PathMark)):
            return key
    return "--json"


def _is_shared(path: str) -> bool:
    return re.match(r"/|[a-z0-9]+:/", path) is not None


def _check_tracking(values: list[MarkedValue]) -> None:
    registered = any(value.startswith("models:/") for _, value, _ in values)
    for key, value, mark in values:
        if not isinstance(mark, TrackingMark):
            continue
        local = not value.removeprefix("sqlite:///").startswith("/") if value.startswith("sqlite:") else False
        if local or (not value and (mark.always or registered)):
            raise UserError(f"{key}: a job on a cluster needs the URI of an MLflow server: {key}=http://HOST:5000")


def _is_path(value: str, mark: PathMark, root: Path) -> bool:
    if not value or mark.access is None or (mark.may_be_registered and value.startswith("models:/")):
        return False
    return not mark.may_be_name or (root / value).exists()
