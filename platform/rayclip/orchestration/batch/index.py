"""Indexing tens of thousands of shards: Ray tasks of a few shards each, a bounded number of them at a time."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import ray

from rayclip.config import IndexConfig
from rayclip.data.formats import Layout, Shard
from rayclip.data.index import PARTIAL, Indexed, index_shard, known_shards, make_plan, to_manifest
from rayclip.errors import UserError
from rayclip.io.s3 import File
from rayclip.io.storage import join, remove, write_bytes
from rayclip.orchestration.cluster.connection import connect
from rayclip.orchestration.cluster.progress import ProgressLine

Task = TypeVar("Task")
Result = TypeVar("Result")

_SAVE_EVERY_S = 60.0
_MOST_SHARDS_A_TASK = 16
CLASS_NAMES = "classnames.txt"

_Work = tuple[str, File]
"""A shard's path and what the listing said of it."""


def index(config: IndexConfig) -> dict[str, Any]:
    """Write the manifest of what lies at a path; shards that have not changed since the last time are not read again.

    Returns {"path", "format", "samples", "shards", "read", "chunks", "bytes", "digest", "problems"}. Raises UserError
    where there are no samples, and for a shard that is not whole, unless `broken` is salvage.
    """
    plan = make_plan(config)
    notes: dict[str, object] = {"chunk_samples": config.chunk_samples, "broken": config.broken}
    found = known_shards(plan, notes)
    new = [file for file in plan.shards if file.name not in found]
    work = partial(_index_all, chunk_samples=config.chunk_samples, layout=plan.layout, salvage=config.broken != "stop")
    progress = ProgressLine(len(plan.shards), unit="shards", start=len(found))
    saved_at, num_read = time.monotonic(), 0
    for results in _run(_groups([(plan.path(file), file) for file in new]), work):
        found |= {result.name: result for result in results}
        num_read += len(results)
        progress.update(len(found))
        if time.monotonic() - saved_at > _SAVE_EVERY_S:
            to_manifest(plan, found, notes).save(PARTIAL)
            saved_at = time.monotonic()
    progress.close()
    manifest = to_manifest(plan, found, notes)
    problems = [found[file.name].problem for file in plan.shards if found[file.name].problem]
    if not len(manifest):
        raise UserError(f"what lies at '{config.path}' holds no samples{': ' + str(problems[0]) if problems else ''}")
    manifest.save()
    if plan.class_names:
        write_bytes(join(plan.folder, CLASS_NAMES), "".join(f"{name}\n" for name in plan.class_names).encode())
    remove(join(plan.folder, PARTIAL))
    return {
        "path": plan.folder,
        "format": plan.layout.kind,
        "samples": manifest.total_samples,
        "shards": len(manifest.shards),
        "read": num_read,
        "chunks": len(manifest),
        "bytes": sum(manifest.shard_bytes),
        "digest": manifest.digest,
        "problems": problems,
    }


def _groups(work: Sequence[_Work]) -> list[list[_Work]]:
    """A few shards a task; one task alone is done here, without a cluster."""
    if len(work) <= 1:
        return [list(work)] if work else []
    size = max(1, min(_MOST_SHARDS_A_TASK, len(work) // 64))
    return [list(work[first : first + size]) for first in range(0, len(work), size)]


def _index_all(work: Sequence[_Work], chunk_samples: int, layout: Layout, salvage: bool) -> list[Indexed] | UserError:
    """A UserError comes back as a result; Ray would wrap it in a traceback."""
    try:
        results = []
        for path, (name, size, stamp) in work:
            chunks, problem = index_shard(Shard(path, size), chunk_samples, layout, salvage)
            results.append(Indexed(name, size, stamp, np.asarray(chunks, dtype=np.int64).reshape(-1, 3), problem))
        return results
    except UserError as error:
        return error


def _run(tasks: Sequence[Task], work: Callable[[Task], Result | UserError]) -> Iterator[Result]:
    """Do the work on every task somewhere in the cluster; results come as they are ready."""
    for result in map(work, tasks) if len(tasks) <= 1 else _run_on_cluster(tasks, work):
        if isinstance(result, UserError):
            raise result
        yield result


def _run_on_cluster(tasks: Sequence[Task], work: Callable[[Task], Result]) -> Iterator[Result]:
    connect()
    do: Any = ray.remote(_plain(work))
    most = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    left = list(reversed(tasks))
    running: list[ray.ObjectRef] = []
    while left or running:
        while left and len(running) < most:
            running.append(do.remote(left.pop()))
        done, running = ray.wait(running)
        yield from ray.get(done)


def _plain(work: Callable[[Task], Result]) -> Callable[[Task], Result]:
    """As the plain function that Ray wants."""

    def do(task: Task) -> Result:
        return work(task)

    return do
