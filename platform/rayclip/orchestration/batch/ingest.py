"""Writing data sets as Ray Data jobs: a row is a shard, and a task does all of it.

What is done in a task is in `rayclip.data.ingest`, which knows nothing of Ray.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray.data

from rayclip.config import IngestConfig
from rayclip.data import ingest as plan
from rayclip.data.sources import SOURCES, Split
from rayclip.errors import UserError
from rayclip.io.paths import remove_tree, staged, storage_path
from rayclip.orchestration.cluster.connection import connect
from rayclip.orchestration.cluster.progress import ProgressLine

Task = TypeVar("Task")
Result = TypeVar("Result")

# A handful of bad pairs at the start of a run says little about the share of them in all.
_PAIRS_BEFORE_JUDGING = 1000


def ingest(config: IngestConfig) -> dict[str, Any]:
    """Write the data set that the config describes, or the rest of it; a complete one is only reported.

    Returns {"output", "complete" (whether it was there already), "splits": {name: {"samples", "shards", ...}}}.
    Raises UserError for a source that cannot be read and an output that holds something else.
    """
    config = config.model_copy(update={"output": str(storage_path(config.output))})
    if plan.is_complete(config):
        return {"complete": True, **plan.summary_of(config)}
    splits = _list_source(config)
    tasks = plan.plan(config, splits)
    plan.begin(config, splits)
    left = list(plan.missing(config, tasks))
    if left:
        connect()
    total = sum(len(task.items) for task in tasks)
    done = total - sum(len(task.items) for task in left)
    results: list[plan.ShardResult] = []
    progress = ProgressLine(total, start=done)
    for result in _run(left, lambda task: plan.write_one_shard(config, task)):
        results.append(result)
        done += result.num_samples + len(result.skipped)
        progress.update(done, skipped=plan.causes_of(results) or "0")
        if done >= _PAIRS_BEFORE_JUDGING:
            plan.check_bad(config, results)
    progress.close()
    return {"complete": False, **plan.finish(config, tasks)}


def _list_source(config: IngestConfig) -> dict[str, Split]:
    """The source's items. What a failed listing leaves of downloads is removed."""
    output = storage_path(config.output)
    began = output.exists()
    try:
        with staged(output / plan.STATE / "cache") as cache:
            return SOURCES[config.source.kind].splits(config.source, cache)
    except UserError:
        if not began:
            remove_tree(output)
        raise


def _run(tasks: Sequence[Task], work: Callable[[Task], Result]) -> Iterator[Result]:
    """Do the work on every task somewhere in the cluster; results come as they are ready.

    A UserError of a task is raised here as it is; Ray would wrap it in a traceback.
    """

    def do(row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            return {"done": pickle.dumps(work(pickle.loads(row["task"])))}
        except UserError as error:
            return {"done": pickle.dumps(error)}

    rows = [{"task": pickle.dumps(task)} for task in tasks]
    if not rows:
        return
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(do)
    for row in dataset.iter_rows():
        result = pickle.loads(row["done"])
        if isinstance(result, UserError):
            raise result
        yield result
