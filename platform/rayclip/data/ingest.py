"""Turning a source into a data set: which sample goes into which shard, and writing one shard.

Plain functions of the config: the same bytes wherever, and however often, a shard is written.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rayclip.config import IngestConfig
from rayclip.config.base import Effect
from rayclip.config.fields import keys_with, without
from rayclip.data.decode import BadSampleError
from rayclip.data.encode import to_sample
from rayclip.data.formats.tar import Sample, Span, write_shard
from rayclip.data.manifest import FILE_NAME, Manifest
from rayclip.data.order import mix64
from rayclip.data.sources import SOURCES, Split
from rayclip.io.files import whole_file
from rayclip.io.paths import StoragePath, matching, storage_path

CLASS_NAMES = "classnames.txt"


class ShardTask(NamedTuple):
    """One shard to write: its items and their places in the split's order."""

    split: str
    shard: int
    first: int
    items: Sequence[Any]


class ShardResult(NamedTuple):
    """A shard that was written. `skipped` has (position in the split, cause, what it was)."""

    split: str
    shard: int
    num_bytes: int
    spans: list[Span]
    skipped: list[tuple[int, str, str]]

    @property
    def num_samples(self) -> int:
        """Number of samples in the shard."""
        return sum(span.num_samples for span in self.spans)

    @property
    def tally(self) -> dict[str, dict[str, int]]:
        """Counts of the items: all, those that were skipped, and why."""
        causes = Counter(cause for _, cause, _ in self.skipped)
        rows = {"samples": self.num_samples + len(self.skipped), "bad": len(self.skipped)}
        return {"rows": rows, "causes": dict(causes)}


def shard_name(shard: int) -> str:
    """Return the file name of a split's shard."""
    return f"{shard:06}.tar"


def plan_shards(config: IngestConfig, splits: dict[str, Split]) -> list[ShardTask]:
    """Return every shard of the data set: each split's items in an order that the seed alone gives, cut to size."""
    tasks = []
    for split, (items, _) in splits.items():
        order = np.argsort(mix64(config.seed, np.arange(len(items))), kind="stable")
        for shard, first in enumerate(range(0, len(items), config.shard_samples)):
            chosen = [items[i] for i in order[first : first + config.shard_samples]]
            tasks.append(ShardTask(split, shard, first, chosen))
    return tasks


def settings_of(config: IngestConfig) -> dict[str, Any]:
    """The settings that decide the data set's bytes."""
    return {"format": 1, **without(config.model_dump(mode="json"), keys_with(IngestConfig, Effect.SAME_RESULT))}


def content_of(config: IngestConfig, splits: dict[str, Split]) -> str | None:
    """SHA-256 of what the items' files are now; None for a source that has no files of its own.

    It takes the sizes of pictures and the text of captions: a source that was copied elsewhere has not changed.
    """
    stamp = getattr(SOURCES[config.source.kind], "stamp", None)
    if stamp is None:
        return None
    stamps = [stamp(item) for items, _ in splits.values() for item in items]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def digest_of(splits: dict[str, Split]) -> str:
    """Return the SHA-256 of what the source listed: it tells a source that changed between two runs."""
    state = hashlib.sha256()
    for split, (items, class_names) in splits.items():
        state.update(repr((split, len(items), class_names)).encode())
        for item in items:
            state.update(repr(item).encode())
    return state.hexdigest()


def write_shard_of(config: IngestConfig, task: ShardTask) -> ShardResult:
    """Read the task's items and write them as one shard, whole and then named. Bad pairs are skipped."""
    skipped = []

    def samples() -> Iterator[Sample]:
        for position, item in enumerate(task.items, task.first):
            try:
                record = SOURCES[config.source.kind].read(item, config.source)
                yield to_sample(record, f"{position:09}", config)
            except BadSampleError as error:
                skipped.append((position, error.cause, _describe(item)))

    with whole_file(storage_path(config.output) / task.split / shard_name(task.shard)) as target:
        spans = write_shard(target, samples(), config.chunk_samples)
        return ShardResult(task.split, task.shard, target.tell(), spans, skipped)


def summary_of(output: StoragePath, skipped: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a complete data set holds, read from its folder, and how many pairs of each split were skipped."""
    splits = {}
    for path in matching(output, f"*/{FILE_NAME}"):
        manifest = Manifest.load(str(path.parent))
        mine = Counter(line["cause"] for line in skipped if line["split"] == path.parent.name)
        classes = path.parent / CLASS_NAMES
        splits[path.parent.name] = {
            "samples": manifest.total_samples,
            "shards": len(manifest.shards),
            "bytes": sum(manifest.shard_bytes),
            "classes": len(classes.read_text().splitlines()) if classes.is_file() else None,
            "skipped": dict(mine),
            "digest": manifest.digest,
        }
    return {"output": str(output), "splits": splits}


def _describe(item: object) -> str:
    """What a skipped item was, without the bytes of its picture."""
    parts = item if isinstance(item, tuple) else (item,)
    return ", ".join(str(part) for part in parts if isinstance(part, str))
