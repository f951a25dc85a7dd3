"""What travels with a submitted job: the tree of the caller, and the checks that the job will find there what it names.

A job runs in a temporary folder that holds what was shipped, and what it writes there goes with it.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

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

_PATH_KEYS = (
    "path",
    "data",
    "embeddings",
    "input",
    "root",
    "law",
    "run",
    "queries",
    "scores",
    "branch_from",
    "artifacts",
)
"""Keys that always hold a path: to be read, or, `artifacts`, to be written by the job and read by others."""
_OTHER_KEYS = ("weights", "model", "labels", "source")
"""Keys that hold a path where there is something at it."""
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


def check_paths(config: dict[str, Any], summary: str, shipment: Shipment, root: Path) -> list[str]:
    """The absolute paths that a job reads and writes, which only the cluster can check.

    Raises UserError for one that the job would not find, or whose content would go with the job's temporary folder.
    """
    if not _is_shared(summary):
        key = next((key for key in ("runs", "sweeps", "output", "path") if key in config), "--json")
        raise UserError(f"the job would write '{summary}' into a folder that is removed with it: {key}: {_SHARED}")
    leaves = list(_leaves(config))
    _check_tracking(leaves)
    for key, value in leaves:
        if _names_path(key, value, root) and not _is_shared(value) and not shipment.holds(value):
            raise UserError(f"{key} is '{value}', which is not shipped with the job: {_SHARED}")
    return sorted({value for _, value in leaves if value.startswith("/")})


def _is_shared(path: str) -> bool:
    return re.match(r"/|[a-z0-9]+:/", path) is not None


def _check_tracking(leaves: list[tuple[str, str]]) -> None:
    registered = any(value.startswith("models:/") for _, value in leaves)
    for key, value in leaves:
        required = key.endswith("tracking.uri")
        if not required and key != "tracking_uri":
            continue
        local = not value.removeprefix("sqlite:///").startswith("/") if value.startswith("sqlite:") else False
        if local or (not value and (required or registered)):
            raise UserError(f"{key}: a job on a cluster needs the URI of an MLflow server: {key}=http://HOST:5000")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Texts by their dotted keys; nothing is an empty one."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    elif value is None or isinstance(value, str):
        yield key, value or ""


def _names_path(key: str, value: str, root: Path) -> bool:
    last = key.rpartition(".")[2]
    if not value or value.startswith("models:/"):
        return False
    return last in _PATH_KEYS or ((last in _OTHER_KEYS or "/" in value) and (root / value).exists())
