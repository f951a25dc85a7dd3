"""The output of an ingest: splits of tar shards, each written as a part. No Ray here.

ingest.json              the settings, and a digest of what the source listed
.ingest/SPLIT/000000.json   says that a shard is there, and what is in it; the folder goes when the data set is complete
SPLIT/000000.tar         the shard
SPLIT/manifest.parquet   written when all shards are there, as is skipped.jsonl
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from rayclip.config import IngestConfig
from rayclip.config.fields import describe_change
from rayclip.data.formats.tar import Span
from rayclip.data.ingest import CLASS_NAMES, ShardResult, ShardTask, digest_of, settings_of, shard_name, summary_of
from rayclip.data.manifest import FILE_NAME, Manifest
from rayclip.data.sources import Split
from rayclip.errors import UserError
from rayclip.io.files import write_text
from rayclip.io.paths import StoragePath, matching, remove_tree, storage_path
from rayclip.orchestration.batch.partitioned_output import PartitionedOutput, Tally, format_causes

STATE = ".ingest"
SKIPPED = "skipped.jsonl"
_ITEMS, _CONTENT = "items", "content"


@dataclass(frozen=True)
class IngestOutput(PartitionedOutput):
    """A data set that is being ingested. Before the source is listed it has no parts and names no items."""

    shards: Sequence[tuple[str, int]] = ()
    """(split, number in the split) of each part."""
    class_names: Mapping[str, Sequence[str] | None] = field(default_factory=dict)
    """Of each split, where it has any."""

    LEFTOVERS: ClassVar[tuple[str, ...]] = ("*.partial-*", "*/*.partial-*")

    @classmethod
    def unlisted(cls, config: IngestConfig) -> "IngestOutput":
        """The output before the source is listed."""
        return cls(storage_path(config.output), settings_of(config), 0)

    def listed(
        self, splits: dict[str, Split], tasks: Sequence[ShardTask], content: str | None = None
    ) -> "IngestOutput":
        """This output with the shards that are made from what the source listed; `content` tells the items' files."""
        return replace(
            self,
            identity={**self.identity, _ITEMS: digest_of(splits), **({_CONTENT: content} if content else {})},
            num_parts=len(tasks),
            shards=[(task.split, task.shard) for task in tasks],
            class_names={name: split.class_names for name, split in splits.items()},
        )

    @property
    def kind(self) -> str:
        """Name of the job."""
        return "ingest"

    @property
    def state(self) -> StoragePath:
        """The folder that is there while the data set is not complete."""
        return self.path / STATE

    @property
    def _first_names(self) -> tuple[str, ...]:
        return STATE, *super()._first_names

    def _difference(self, there: dict[str, Any]) -> str | None:
        items, content, wanted = there.pop(_ITEMS, None), there.pop(_CONTENT, None), dict(self.identity)
        listed, now = wanted.pop(_ITEMS, items), wanted.pop(_CONTENT, content)
        if there != wanted:
            return f"is a data set of other settings ({describe_change(there, wanted)})"
        if listed != items:
            return "was begun from other items, and the source has changed since"
        # The record of an earlier release does not tell the files.
        return "is of files that have changed in the source since" if content and now != content else None

    def begin(self) -> None:
        """Make the folders and write the records, which is put off until the source is listed."""
        self.state.mkdir(parents=True, exist_ok=True)
        if _ITEMS not in self.identity:
            return
        super().begin()
        for split, class_names in self.class_names.items():
            (self.path / split).mkdir(parents=True, exist_ok=True)
            (self.state / split).mkdir(parents=True, exist_ok=True)
            if class_names is not None:
                write_text(self.path / split / CLASS_NAMES, "".join(f"{name}\n" for name in class_names))

    def file(self, part: int) -> StoragePath:
        """The record of a shard."""
        split, shard = self.shards[part]
        return self.state / split / f"{shard:06}.json"

    def tally(self, part: int) -> Tally | None:
        """The counts of a shard that is there; None for one that is missing."""
        try:
            return self._read(part).tally
        except (OSError, ValueError):
            return None

    def write(self, number: int, part: Any) -> None:
        """Write the record of a shard that is there, a `ShardResult`."""
        write_text(self.file(number), json.dumps(part))

    def first_bad(self) -> str | None:
        """The first pair that was skipped, in words."""
        there = (self._read(part) for part in range(self.num_parts) if self.tally(part) is not None)
        return next((result.skipped[0][2] for result in there if result.skipped), None)

    def read_summary(self) -> dict[str, Any] | None:
        """What the data set holds; None for one that is not complete. Raises UserError where it has lost shards."""
        if not (self.path / SKIPPED).is_file() or self.state.exists():
            return None
        for path in matching(self.path, f"*/{FILE_NAME}"):
            Manifest.load(str(path.parent)).check_shards()
        return summary_of(self.path, self._read_skipped())

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write every split's manifest and the list of what was skipped; from then on the data set is complete.

        Returns what it holds. Raises UserError for a split without a usable pair.
        """
        results = [self._read(part) for part in range(self.num_parts)]
        for split in dict.fromkeys(split for split, _ in self.shards):
            mine = [result for result in results if result.split == split and result.num_samples]
            if not mine:
                causes = format_causes({"causes": summary["causes"]}) or "it is empty"
                raise UserError(f"split '{split}' of the source has no usable pair: {causes}")
            shards = [(shard_name(r.shard), r.num_bytes, r.spans) for r in mine]
            Manifest.from_spans(str(self.path / split), shards).save()
        lines = [
            json.dumps({"split": result.split, "position": position, "cause": cause, "item": item})
            for result in results
            for position, cause, item in result.skipped
        ]
        write_text(self.path / SKIPPED, "".join(f"{line}\n" for line in lines))
        remove_tree(self.state)
        return summary_of(self.path, self._read_skipped())

    def _read(self, part: int) -> ShardResult:
        split, shard, num_bytes, spans, skipped = json.loads(self.file(part).read_text())
        return ShardResult(split, shard, num_bytes, [Span(*span) for span in spans], [tuple(line) for line in skipped])

    def _read_skipped(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / SKIPPED).read_text().splitlines()]
