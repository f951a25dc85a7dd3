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
from rayclip.config.base import PathMark, TrackingMark
from rayclip.config.fields import MarkedValue, marked_values, marks_in
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
    named = {
        value
        for key, value, mark in marked_values(config)
        if isinstance(mark, PathMark) and mark.access == "read" and key.rpartition(".")[2] != "path"
        if _is_path(value, mark, folder) and not _is_shared(value)
    }
    return sorted(value for value in named if (folder / value).is_file() and ".." not in Path(value).parts)


def check_paths(config: Config, summary: str, shipped: Sequence[str], folder: Path) -> tuple[list[str], list[str]]:
    """Return why the job would not find what it reads, or would lose what it writes, a line each; and the absolute
    paths that it names, which only the cluster can check. `shipped`: the inputs that travel, relative to `folder`.
    """
    values = marked_values(config)
    paths = [(key, value, mark) for key, value, mark in values if isinstance(mark, PathMark)]
    local = [found for found in paths if _is_path(found[1], found[2], folder) and not _is_shared(found[1])]
    # A sweep puts the runs of its trials into a folder of its own, wherever its recipe would have them.
    lost = [(key, value) for key, value, mark in local if mark.access == "write" and key != "base.runs"]
    # What a command makes of no output, or of a relative one, is absolute, and below the folder that it runs in.
    given = any(summary.startswith(value) for _, value, _ in paths if value.startswith("/"))
    if not lost and (not _is_shared(summary) or (summary.startswith(f"{folder}/") and not given)):
        lost = [(_output_key(type(config)), summary)]
    problems = [
        f"the job would write '{path}' into a folder that is removed with it: {key}: {_SHARED}" for key, path in lost
    ]
    problems += _check_tracking(values)
    for key, value, mark in local:
        if mark.access == "read" and value not in shipped:
            problems.append(f"{key} is '{value}', which is not shipped with the job: {_SHARED}")
    size = sum((folder / name).stat().st_size for name in shipped)
    if size > _MOST_INPUT_BYTES:
        problems.append(f"{', '.join(shipped)} would travel with the job, and are {size / 1e6:,.0f} MB: {_SHARED}")
    return problems, sorted({value for _, value, _ in paths if value.startswith("/")})


def check_caches(config: Config) -> list[str]:
    """Return, a line each, the caches that every node would have for itself: what one writes others would miss."""
    caches = [
        (f.key, f.value) for f in marked_values(config) if isinstance(f.mark, PathMark) and f.mark.access == "cache"
    ]
    return [
        f"{key} is '{value}', of which each node has its own: {_SHARED}"
        for key, value in caches
        if not _is_shared(value)
    ]


def _output_key(schema: type[Config]) -> str:
    """The key that says where a job writes, or the option that says where its summary goes."""
    for key, field in schema.model_fields.items():
        if any(mark.access == "write" for mark in marks_in(field, PathMark)):
            return key
    return "--json"


def _is_shared(path: str) -> bool:
    return re.match(r"/|[a-z0-9]+:/", path) is not None


def _check_tracking(values: list[MarkedValue]) -> Iterator[str]:
    registered = any(value.startswith("models:/") for _, value, _ in values)
    for key, value, mark in values:
        if not isinstance(mark, TrackingMark):
            continue
        local = not value.removeprefix("sqlite:///").startswith("/") if value.startswith("sqlite:") else False
        if local or (not value and (mark.always or registered)):
            yield f"{key}: a job on a cluster needs the URI of an MLflow server: {key}=http://HOST:5000"


def _is_path(value: str, mark: PathMark, folder: Path) -> bool:
    if not value or mark.access is None or (mark.may_be_registered and value.startswith("models:/")):
        return False
    return not mark.may_be_name or (folder / value).exists()
