"""What travels with a submitted job: the package of the caller, the config and the files that it names, and the checks
that the job will find there what it names.

A job runs in a temporary folder that holds what was shipped, and what it writes there goes with it.
"""

import copy
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from rayclip.config import Config
from rayclip.orchestration.cluster import ray_internals
from rayclip.orchestration.cluster.ray_internals import JOB_ENVIRONMENT

PACKAGE = Path(__file__).resolve().parents[2]
"""The package that this process runs, in a checkout or installed."""
RUNTIME_ENV: dict[str, Any] = {
    "py_modules": [str(PACKAGE)],  # without this, workers find the installed copy of the library, or none
    "excludes": ["__pycache__/"],
    "env_vars": JOB_ENVIRONMENT,
}
"""What every submitted job runs in, apart from its working directory."""

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
_OUTPUT_KEYS = ("runs", "sweeps", "output")
"""Keys that hold the folder that a job writes."""
_OTHER_KEYS = ("weights", "model", "labels", "source")
"""Keys that hold a path where there is something at it."""
_SHARED = "give an absolute path that all nodes share, or a URI"
_MOST_INPUT_BYTES = 20_000_000
"""Larger files belong on shared storage: what a job brings is kept in the memory of the cluster's head."""


@dataclass(frozen=True)
class Shipment:
    """What is uploaded: the folder that the job will run in, and how much that and the package come to when packed."""

    folder: Path
    num_files: int
    num_bytes: int

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment, in Ray's words."""
        return {**copy.deepcopy(RUNTIME_ENV), "working_dir": str(self.folder)}


def pack(folder: Path) -> Shipment:
    """Measure what Ray uploads of a job's folder and of the package, packed by the same code."""
    files = 0
    num_bytes = 0
    for source in (folder, PACKAGE):
        names, size = packed_files(source)
        files += len(names)
        num_bytes += size
    return Shipment(folder, files, num_bytes)


def packed_files(source: Path) -> tuple[frozenset[str], int]:
    """Return the names of the files in a folder that Ray uploads, and how many bytes they are when packed."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        ray_internals.pack(source, package, RUNTIME_ENV["excludes"])
        with ZipFile(package) as packed:
            names = frozenset(name for name in packed.namelist() if not name.endswith("/"))
        return names, package.stat().st_size


def local_inputs(config: Config, folder: Path) -> list[str]:
    """Return the relative paths of files below a folder that a config names as input: they travel with the job.

    What a `path` names is data, which does not: a table names further files beside it.
    """
    values = [(key, value) for key, value in _leaves(config.model_dump(mode="json")) if not key.endswith("path")]
    named = {value for key, value in values if _names_path(key, value, folder) and not _is_shared(value)}
    return sorted(value for value in named if (folder / value).is_file() and ".." not in Path(value).parts)


def check_paths(config: Config, summary: str, shipped: Sequence[str], folder: Path) -> tuple[list[str], list[str]]:
    """Return why the job would not find what it reads, or would lose what it writes, a line each; and the absolute
    paths that it names, which only the cluster can check. `shipped`: the inputs that travel, relative to `folder`.
    """
    leaves = list(_leaves(config.model_dump(mode="json")))
    problems = [*_check_outputs(config, summary, leaves, folder), *_check_tracking(leaves)]
    for key, value in leaves:
        if _names_path(key, value, folder) and not _is_shared(value) and value not in shipped:
            problems.append(f"{key} is '{value}', which is not shipped with the job: {_SHARED}")
    size = sum((folder / name).stat().st_size for name in shipped)
    if size > _MOST_INPUT_BYTES:
        problems.append(f"{', '.join(shipped)} would travel with the job, and are {size / 1e6:,.0f} MB: {_SHARED}")
    return problems, sorted({value for _, value in leaves if value.startswith("/")})


def _is_shared(path: str) -> bool:
    return re.match(r"/|[a-z0-9]+:/", path) is not None


def _check_outputs(config: Config, summary: str, leaves: list[tuple[str, str]], folder: Path) -> Iterator[str]:
    written = [key for key in _OUTPUT_KEYS if hasattr(config, key)]
    lost = {key: getattr(config, key) for key in written if getattr(config, key)}
    lost = {key: value for key, value in lost.items() if not _is_shared(value)}
    # What commands make of no output, or of a relative one, is absolute, and below the folder that they run in.
    given = any(summary.startswith(value) for _, value in leaves if value.startswith("/"))
    if not lost and (not _is_shared(summary) or (summary.startswith(f"{folder}/") and not given)):
        lost = {(written or ["--json"])[0]: summary}
    for key, value in lost.items():
        yield f"the job would write '{value}' into a folder that is removed with it: {key}: {_SHARED}"


def _check_tracking(leaves: list[tuple[str, str]]) -> Iterator[str]:
    registered = any(value.startswith("models:/") for _, value in leaves)
    for key, value in leaves:
        required = key.endswith("tracking.uri")
        if not required and key != "tracking_uri":
            continue
        local = not value.removeprefix("sqlite:///").startswith("/") if value.startswith("sqlite:") else False
        if local or (not value and (required or registered)):
            yield f"{key}: a job on a cluster needs the URI of an MLflow server: {key}=http://HOST:5000"


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
