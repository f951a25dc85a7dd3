"""Ingest: what a source lists is written into tar shards by the whole cluster, a task a shard."""

from functools import partial
from typing import Any

from rayclip.config import IngestConfig
from rayclip.data.ingest import content_of, plan_shards, write_shard_of
from rayclip.data.sources import SOURCES, Split
from rayclip.errors import UserError
from rayclip.io.paths import remove_tree, staged, storage_path
from rayclip.orchestration.batch.ingest_output import IngestOutput
from rayclip.orchestration.batch.output_jobs import OutputJob, complete_output, write_missing


def ingest(config: IngestConfig) -> dict[str, Any]:
    """Write the data set that the config describes, or the rest of it; a complete one is only reported.

    Returns {"complete" (whether it was there already), "output", "splits": {name: {"samples", "shards", ...}}}.
    Raises UserError for a source that cannot be read and an output that holds something else.
    """
    config = config.model_copy(update={"output": str(storage_path(config.output))})
    output = IngestOutput.unlisted(config)
    is_new = not output.path.exists()
    _check_source(config, output)
    return {"complete": True, **complete_output(output, None, lambda: _write(config, output, is_new))}


def _write(config: IngestConfig, output: IngestOutput, is_new: bool) -> dict[str, Any]:
    splits = _list_source(config, output, is_new)
    tasks = plan_shards(config, splits)
    output = output.listed(splits, tasks, content_of(config, splits))
    output.check()
    output.begin()
    job = OutputJob(output, lambda: partial(write_shard_of, config), inputs=tasks)
    total = sum(len(task.items) for task in tasks)
    tally, _, _ = write_missing([job], None, total, config.max_bad_fraction)
    return {"complete": False, **output.finish(dict(tally))}


def _check_source(config: IngestConfig, output: IngestOutput) -> None:
    """Raise UserError where a data set is complete and the files of its source, if they are there, have changed."""
    path = getattr(config.source, "path", None)
    if path is None or not storage_path(path).exists():
        return
    output.check()
    if output.read_summary() is not None:
        splits = _list_source(config, output, is_new=False)
        output.listed(splits, (), content_of(config, splits)).check()


def _list_source(config: IngestConfig, output: IngestOutput, is_new: bool) -> dict[str, Split]:
    """The source's items. What a failed listing leaves of downloads is removed."""
    try:
        with staged(output.state / "cache") as cache:
            return SOURCES[config.source.kind].splits(config.source, cache)
    except UserError:
        if is_new:
            remove_tree(output.path)
        raise
