"""Resumable outputs: a folder of parts, what is there, what is missing, and what it was made from. No Ray here.

KIND.json            what the parts are made from: a run that goes on must say the same
part-000000.parquet  a function of KIND.json and its number alone; its metadata hold both and its tally
summary.json         what it all came to; the last file that is written

A subclass may keep its parts otherwise (`ingest_output`); whose the folder is, what is missing and who may write to it
is decided here for all.
"""

import json
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.config.fields import describe_change
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.io.files import whole_file, write_json
from rayclip.io.lease import FILE_NAMES, Lease, hold
from rayclip.io.paths import StoragePath, matching
from rayclip.orchestration.cluster.progress import note

Tally = dict[str, dict[str, int]]
"""Counts by group: {"rows": {"samples": 64, "bad": 1}, "causes": {"no_image": 1}}."""

_KEY = b"rayclip"
_SUMMARY = "summary.json"
_MARKER_LOOKS, _MARKER_WAIT_S = 6, 1.0  # file systems on a network show a new file late

# The first that differs is named: what lies there, and what this run would put there.
_DIFFERENCES = {
    "model_version": "is by model {there}, this run is by {here}",
    "weights_sha256": "is by other weights under the same name {model_version}",
    "source_digest": "was made from '{source}' as it was, and this is another data set",
    "labels_digest": "has other labels or templates",
    "what": "has {there}, not {here}",
    "top_k": "has the best {there} labels, not {here}",
    "settings": "was made with other settings ({changed})",
    "part_samples": "has parts of {there} samples, not of {here}",
}


class Part(NamedTuple):
    """One part's rows as a table, and their counts."""

    table: pa.Table
    tally: Tally


@dataclass(frozen=True)
class PartitionedOutput:
    """The output of one job. `identity` is JSON; its `kind` is the job's name."""

    path: StoragePath
    identity: dict[str, Any]
    num_parts: int

    # What a crash may leave half written; `attempts` are of earlier releases.
    LEFTOVERS: ClassVar[tuple[str, ...]] = ("*.partial-*", "*.attempts")

    @property
    def kind(self) -> str:
        """Name of the job, as in `rayclip embed`."""
        return str(self.identity["kind"])

    @property
    def _record(self) -> StoragePath:
        return self.path / f"{self.kind}.json"

    @property
    def _first_names(self) -> tuple[str, ...]:
        """What a run that was killed as it began may have made: beginnings of names."""
        return (self._record.name, *FILE_NAMES)

    def file(self, part: int) -> StoragePath:
        """The file that says that a part is there."""
        return self.path / f"part-{part:06}.parquet"

    def check(self) -> None:
        """Raise UserError where the folder holds something that is not of this identity."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output '{self.path}' is a file, not a folder")
        if not self._record.is_file():
            if self.path.exists() and any(not p.name.startswith(self._first_names) for p in self.path.iterdir()):
                raise UserError(
                    f"output '{self.path}' is not empty and holds nothing of rayclip {self.kind}: choose another folder"
                )
            return
        difference = self._difference(json.loads(self._record.read_text()))
        if difference is not None:
            raise UserError(f"what lies in '{self.path}' {difference}: choose another output, or delete that folder")

    def _difference(self, there: dict[str, Any]) -> str | None:
        """How the folder's record differs from this run's identity, in words; None where it does not."""
        for key, text in _DIFFERENCES.items():
            if there.get(key) != self.identity.get(key):
                a, b = there.get(key), self.identity.get(key)
                changed = describe_change(a, b) if isinstance(a, dict) and isinstance(b, dict) else ""
                return text.format(**{**there, "there": a, "here": b, "changed": changed})
        return None

    @contextmanager
    def writing(self) -> Iterator[Lease]:
        """Make the folder this process's own while the block runs. The one way to write to an output, of any kind.

        Raises HeldError, a UserError, where another process holds it.
        """
        with hold(self.path, f"output '{self.path}'", say=note) as lease:
            self.check()  # whoever held it until now may have put something there
            self._clear()
            self.begin()
            try:
                yield lease
            finally:
                self._clear()

    @contextmanager
    def marked(self) -> Iterator[StoragePath]:
        """Put a file into the folder, by which workers see that theirs is the same one, while the block runs; its path.

        What another host writes to a disk of its own would be counted, and be missing where it is read.
        """
        marker = self.path / f"{self.kind}.partial-{uuid.uuid4().hex[:8]}"
        if not isinstance(marker, Path):  # an object store is the same for all
            yield marker
            return
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        try:
            yield marker
        finally:
            marker.unlink(missing_ok=True)

    def check_marker(self, marker: StoragePath) -> None:
        """Raise UserError on a host that does not see the file of `marked`, also not after a few seconds."""
        for _ in range(_MARKER_LOOKS):
            if not isinstance(marker, Path) or marker.is_file():
                return
            time.sleep(_MARKER_WAIT_S)
        raise UserError(
            f"'{self.path}' is not the same folder on host '{platform.node()}', which works on it too: "
            "give a path that all nodes share, or s3://BUCKET/KEY"
        )

    def _clear(self) -> None:
        """Remove what workers that were lost, or killed, left half written."""
        for pattern in self.LEFTOVERS:
            for left in matching(self.path, pattern):
                left.unlink(missing_ok=True)

    def begin(self) -> None:
        """Write the record of what the parts are made from."""
        write_json(self._record, self.identity)

    def missing(self) -> tuple[list[int], Tally]:
        """The parts that are still to be written, and the tally of those that are there."""
        tallies = {part: self.tally(part) for part in range(self.num_parts)}
        return [p for p, tally in tallies.items() if tally is None], add(t for t in tallies.values() if t is not None)

    def tally(self, part: int) -> Tally | None:
        """The counts of a part that is there; None for one that is missing or damaged."""
        try:
            with self.file(part).open("rb") as file:
                metadata = pq.read_schema(file).metadata or {}
            tally: Tally = json.loads(metadata[_KEY])["tally"]
            return tally
        except (OSError, pa.ArrowInvalid, KeyError, ValueError):
            return None

    def write(self, number: int, part: Any) -> None:
        """Write a part's content, a `Part`, whole and then named."""
        meta = {**self.identity, "part": number, "tally": part.tally}
        table = part.table.replace_schema_metadata({_KEY: json.dumps(meta)})
        texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
        with whole_file(self.file(number)) as target:
            pq.write_table(table, target, compression="zstd", use_dictionary=texts)

    def first_bad(self) -> str | None:
        """A sample that cannot be used, in words, where the parts say so."""
        return None

    def read_summary(self) -> dict[str, Any] | None:
        """What `finish` wrote, where every part is still there; None for an output that is not complete."""
        if not (self.path / _SUMMARY).is_file():
            return None
        names = {path.name for path in self.path.glob("part-*.parquet")}
        if any(self.file(part).name not in names for part in range(self.num_parts)):
            return None
        return json.loads((self.path / _SUMMARY).read_text())

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write what the job came to, and return it; from then on the output is complete."""
        write_json(self.path / _SUMMARY, summary)
        return summary


def open_complete(path: StoragePath, kind: str) -> tuple[PartitionedOutput, dict[str, Any]]:
    """Return a complete output of a job and its summary. Raises UserError where it is missing or not complete."""
    if not (path / f"{kind}.json").is_file():
        raise UserError(f"'{path}' holds nothing of rayclip {kind}")
    identity = json.loads((path / f"{kind}.json").read_text())
    try:
        num_parts = json.loads((path / _SUMMARY).read_text())["parts"]
    except FileNotFoundError:
        raise UserError(f"'{path}' is not complete: run its rayclip {kind} again to the end") from None
    folder = PartitionedOutput(path, identity, num_parts)
    summary = folder.read_summary()
    if summary is None:
        raise UserError(f"'{path}' has lost some of its {num_parts:,} parts: run its rayclip {kind} again")
    return folder, summary


def plan_parts(manifest: Manifest, part_samples: int) -> list[range]:
    """Return the chunks of every part: a chunk is in the part that its first sample falls into."""
    ends = manifest.num_samples.cumsum(dtype=np.int64)
    first = (ends - manifest.num_samples) // part_samples
    starts = np.flatnonzero(np.diff(first, prepend=-1)).tolist()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(manifest)], strict=True)]


def add(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies, the largest counts of a group first."""
    total: Tally = {"rows": {"samples": 0, "bad": 0}, "causes": {}}
    for tally in tallies:
        for group, counts in tally.items():
            sums = total.setdefault(group, {})
            for key, count in counts.items():
                sums[key] = sums.get(key, 0) + count
    return {
        group: dict(sorted(counts.items(), key=lambda item: -item[1])) if group != "rows" else counts
        for group, counts in total.items()
    }


def format_causes(tally: Tally) -> str:
    """Return the causes of a tally with their counts, as "12 no_caption, 3 image_undecodable"."""
    return ", ".join(f"{count:,} {cause}" for cause, count in tally["causes"].items())


def check_bad(tally: Tally, max_bad_fraction: float, example: Callable[[], str | None] = lambda: None) -> None:
    """Raise UserError, with an example where there is one, if more of the samples have an error than is allowed."""
    bad, samples = tally["rows"]["bad"], tally["rows"]["samples"]
    if bad > max_bad_fraction * samples:
        first = example()
        raise UserError(
            f"{bad:,} of {samples:,} samples cannot be used ({format_causes(tally)})"
            f"{f', the first being {first}' if first else ''}; max_bad_fraction allows {max_bad_fraction:.0%}"
        )
