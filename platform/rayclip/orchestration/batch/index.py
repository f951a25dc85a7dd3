"""Indexing tens of thousands of shards, a few a task."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from rayclip.config import IndexConfig
from rayclip.data.formats import Layout
from rayclip.data.index import Indexed, index_file, known_shards, summarize, to_manifest
from rayclip.data.index_plan import CLASS_NAMES, make_plan, output_folder
from rayclip.data.manifest import PARTIAL
from rayclip.errors import UserError
from rayclip.io.lease import hold
from rayclip.io.paths import storage_path
from rayclip.io.s3 import File
from rayclip.io.storage import join, remove, write_bytes
from rayclip.orchestration.batch.task_runner import run_tasks
from rayclip.orchestration.cluster.progress import ProgressLine, note

_SAVE_EVERY_S = 60.0
_MOST_SHARDS_A_TASK = 16

_Work = tuple[str, File]
"""A shard's path and what the listing said of it."""


def index(config: IndexConfig) -> dict[str, Any]:
    """Write the manifest of what lies at a path; shards that have not changed since the last time are not read again.

    Returns {"path", "format", "samples", "shards", "read", "chunks", "bytes", "digest", "problems"} and all that
    `summarize` gives. Raises UserError where there are no samples, and for a shard that is not whole, unless
    `damaged_shards` is salvage; and where another process indexes into the same folder.
    """
    folder = output_folder(config)
    with hold(storage_path(folder), f"the manifest in '{folder}'", say=note):
        return _index(config)


def _index(config: IndexConfig) -> dict[str, Any]:
    plan = make_plan(config)
    notes: dict[str, object] = {
        "chunk_samples": config.chunk_samples,
        "broken": config.damaged_shards,
        "check": config.check,
    }
    found = known_shards(plan, notes)
    new = [file for file in plan.shards if file.name not in found]
    work = partial(_index_shards, layout=plan.layout, notes=notes)
    progress = ProgressLine(len(plan.shards), unit="shards", start=len(found))
    saved_at, num_read = time.monotonic(), 0
    for results in run_tasks(_groups([(plan.path(file), file) for file in new]), lambda: work, name=_name):
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
        **summarize(plan, found, config),
    }


def _groups(work: Sequence[_Work]) -> list[list[_Work]]:
    """A few shards a task."""
    size = max(1, min(_MOST_SHARDS_A_TASK, len(work) // 64))
    return [list(work[first : first + size]) for first in range(0, len(work), size)]


def _name(work: Sequence[_Work]) -> str:
    return f"'{work[0][0]}'" + (f" and {len(work) - 1} more" if len(work) > 1 else "")


def _index_shards(work: Sequence[_Work], layout: Layout, notes: dict[str, object]) -> list[Indexed]:
    return [index_file(path, file, layout, notes) for path, file in work]
