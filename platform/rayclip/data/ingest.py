"""Turning a source into a data set: which sample goes into which shard, and writing one shard.

Plain functions. While a data set is being written, its folder has a folder `.ingest` with one small record for every
finished shard; a shard counts once that record is there, so a run that was killed goes on from there and ends with
the same bytes. The last act is the manifests, after which `.ingest` goes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rayclip.config import IngestConfig
from rayclip.data.decode import BadSampleError
from rayclip.data.encode import to_sample
from rayclip.data.formats.tar import Sample, Span, write_shard
from rayclip.data.manifest import FILE_NAME, Manifest
from rayclip.data.order import mix64
from rayclip.data.sources import SOURCES, Split
from rayclip.errors import UserError
from rayclip.io.files import whole_file, write_json, write_text
from rayclip.io.paths import StoragePath, matching, remove_tree, storage_path

SETTINGS = "ingest.json"
SKIPPED = "skipped.jsonl"
CLASS_NAMES = "classnames.txt"
STATE = ".ingest"

# What does not change the bytes that are written.
_FREE_KEYS = {"output", "max_bad_fraction"}


class ShardTask(NamedTuple):
    """One shard to write: its items and their places in the split's order."""

    split: str
    shard: int
    first: int
    items: Sequence[Any]

    @property
    def name(self) -> str:
        """The shard's file name."""
        return f"{self.shard:06}.tar"


class ShardResult(NamedTuple):
    """A shard that was written. `skipped` has (position in the split, cause, what it was)."""

    split: str
    shard: int
    num_bytes: int
    spans: list[Span]
    skipped: list[tuple[int, str, str]]

    @property
    def num_samples(self) -> int:
        """Samples in the shard."""
        return sum(span.num_samples for span in self.spans)


def plan(config: IngestConfig, splits: dict[str, Split]) -> list[ShardTask]:
    """Every shard of the data set: each split's items in an order that the seed alone gives, cut to size."""
    tasks = []
    for split, (items, _) in splits.items():
        order = np.argsort(mix64(config.seed, np.arange(len(items))), kind="stable")
        for shard, first in enumerate(range(0, len(items), config.shard_samples)):
            chosen = [items[i] for i in order[first : first + config.shard_samples]]
            tasks.append(ShardTask(split, shard, first, chosen))
    return tasks


def settings_of(config: IngestConfig) -> dict[str, Any]:
    """The settings that decide the data set's bytes."""
    return {"format": 1, **config.model_dump(mode="json", exclude=_FREE_KEYS)}


def digest_of(splits: dict[str, Split]) -> str:
    """SHA-256 of what the source listed: it tells a source that changed between two runs."""
    state = hashlib.sha256()
    for split, (items, class_names) in splits.items():
        state.update(repr((split, len(items), class_names)).encode())
        for item in items:
            state.update(repr(item).encode())
    return state.hexdigest()


def begin(config: IngestConfig, splits: dict[str, Split]) -> None:
    """Make the folders and note the settings. Raises UserError where a run of another source was begun."""
    output, record = storage_path(config.output), {**settings_of(config), "items": digest_of(splits)}
    settings = output / SETTINGS
    if settings.is_file() and json.loads(settings.read_text())["items"] != record["items"]:
        raise UserError(
            f"'{output}' was begun from the same settings but other items: the source has changed since; "
            f"delete the folder or write to another"
        )
    # In this order a run killed between any two lines leaves what the next one takes for its own.
    (output / STATE).mkdir(parents=True, exist_ok=True)
    write_json(settings, record)
    for split, (_, class_names) in splits.items():
        (output / split).mkdir(parents=True, exist_ok=True)
        (output / STATE / split).mkdir(parents=True, exist_ok=True)
        for partial in (output / split).glob("*.partial-*"):
            partial.unlink()
        if class_names is not None:
            write_text(output / split / CLASS_NAMES, "".join(f"{name}\n" for name in class_names))


def is_complete(config: IngestConfig) -> bool:
    """Whether the output already is this data set. Raises UserError where it holds anything else."""
    output = storage_path(config.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file, not a folder")
    if not (output / SETTINGS).is_file():
        if not output.exists() or all(path.name.startswith((STATE, SETTINGS)) for path in output.iterdir()):
            return False
        raise UserError(f"output '{output}' is not empty and holds no data set of jobs.ingest: choose another folder")
    there, wanted = json.loads((output / SETTINGS).read_text()), settings_of(config)
    there.pop("items")
    if there != wanted:
        raise UserError(
            f"'{output}' holds a data set of other settings ({_difference(there, wanted)}): "
            f"choose another output, or delete that folder"
        )
    return (output / SKIPPED).is_file() and not (output / STATE).exists()


def _difference(there: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """The first setting that differs, as "source.seed is 0 there and 1 here"."""
    for key in [*wanted, *there]:
        a, b = there.get(key), wanted.get(key)
        if a != b:
            if isinstance(a, dict) and isinstance(b, dict) and a.get("kind") == b.get("kind"):
                return _difference(a, b, f"{prefix}{key}.")
            if isinstance(a, dict) and isinstance(b, dict):
                key, a, b = f"{key}.kind", a.get("kind"), b.get("kind")
            return f"{prefix}{key} is {a!r} there and {b!r} here"
    raise AssertionError("the settings are equal")


def missing(config: IngestConfig, tasks: Sequence[ShardTask]) -> Iterator[ShardTask]:
    """The shards that are still to be written."""
    for task in tasks:
        if not _record_path(storage_path(config.output), task.split, task.shard).is_file():
            yield task


def write_one_shard(config: IngestConfig, task: ShardTask) -> ShardResult:
    """Read the task's items and write them as one shard, whole and then named. Bad pairs are skipped."""
    output, skipped = storage_path(config.output), []

    def samples() -> Iterator[Sample]:
        for position, item in enumerate(task.items, task.first):
            try:
                record = SOURCES[config.source.kind].read(item, config.source)
                yield to_sample(record, f"{position:09}", config)
            except BadSampleError as error:
                skipped.append((position, error.cause, _describe(item)))

    with whole_file(output / task.split / task.name) as target:
        spans = write_shard(target, samples(), config.chunk_samples)
        result = ShardResult(task.split, task.shard, target.tell(), spans, skipped)
    write_text(_record_path(output, task.split, task.shard), json.dumps(result))
    return result


def finish(config: IngestConfig, tasks: Sequence[ShardTask]) -> dict[str, Any]:
    """Write every split's manifest and the list of what was skipped, and call the data set complete."""
    output = storage_path(config.output)
    results = [_read_record(output, task) for task in tasks]
    splits = list(dict.fromkeys(task.split for task in tasks))
    check_bad(config, results)
    lines = []
    for split in splits:
        mine = [result for result in results if result.split == split and result.num_samples]
        if not mine:
            raise UserError(f"split '{split}' of the source has no usable pair: {causes_of(results) or 'it is empty'}")
        names = {task.shard: task.name for task in tasks if task.split == split}
        Manifest.from_spans(str(output / split), [(names[r.shard], r.num_bytes, r.spans) for r in mine]).save()
    for result in results:
        for position, cause, item in result.skipped:
            lines.append(json.dumps({"split": result.split, "position": position, "cause": cause, "item": item}))
    write_text(output / SKIPPED, "".join(f"{line}\n" for line in lines))
    remove_tree(output / STATE)
    return summary_of(config)


def check_bad(config: IngestConfig, results: Sequence[ShardResult]) -> None:
    """Raise UserError where more of the pairs had to be skipped than the config allows."""
    num_bad = sum(len(result.skipped) for result in results)
    num_all = num_bad + sum(result.num_samples for result in results)
    if num_bad > config.max_bad_fraction * num_all:
        first = next(result.skipped[0] for result in results if result.skipped)
        raise UserError(
            f"{num_bad:,} of {num_all:,} pairs cannot be used ({causes_of(results)}), the first being {first[2]}; "
            f"max_bad_fraction allows {config.max_bad_fraction:.0%}"
        )


def causes_of(results: Sequence[ShardResult]) -> str:
    """As in "12 no_caption, 3 image_undecodable"."""
    counts = Counter(cause for result in results for _, cause, _ in result.skipped)
    return ", ".join(f"{count:,} {cause}" for cause, count in counts.most_common())


def summary_of(config: IngestConfig) -> dict[str, Any]:
    """What a complete data set holds, read from its folder."""
    output = storage_path(config.output)
    skipped = [json.loads(line) for line in (output / SKIPPED).read_text().splitlines()]
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


def _record_path(output: StoragePath, split: str, shard: int) -> StoragePath:
    return output / STATE / split / f"{shard:06}.json"


def _read_record(output: StoragePath, task: ShardTask) -> ShardResult:
    split, shard, num_bytes, spans, skipped = json.loads(_record_path(output, task.split, task.shard).read_text())
    return ShardResult(split, shard, num_bytes, [Span(*span) for span in spans], [tuple(line) for line in skipped])


def _describe(item: object) -> str:
    """What a skipped item was, without the bytes of its picture."""
    parts = item if isinstance(item, tuple) else (item,)
    return ", ".join(str(part) for part in parts if isinstance(part, str))
