"""An output folder of Parquet parts: what is there, what is missing, and whose it is. Nothing here needs Ray.

KIND.json            what the parts are made from: a run that goes on must say the same
part-000000.parquet  a function of KIND.json and its number alone; its metadata hold both and its tally
summary.json         what it all came to; the last file that is written
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.io.files import whole_file, write_json
from rayclip.io.paths import StoragePath, append

Tally = dict[str, dict[str, int]]
"""Counts by group: {"rows": {"samples": 64, "bad": 1}, "causes": {"no_image": 1}}."""

_KEY = b"rayclip"
_SUMMARY = "summary.json"
_MOST_ATTEMPTS = 3

# The first that differs is told: what lies there, and what this run would put there.
_DIFFERENCES = {
    "model_version": "is by model {there}, this run is by {here}",
    "weights_sha256": "is by other weights under the same name {model_version}",
    "source_digest": "was made from '{source}' as it was, and this is another data set",
    "labels_digest": "has other labels or templates",
    "what": "has {there}, not {here}",
    "top_k": "has the best {there} labels, not {here}",
    "settings": "was made with other settings",
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

    @property
    def _record(self) -> StoragePath:
        return self.path / f"{self.identity['kind']}.json"

    def _attempts(self, part: int) -> StoragePath:
        return self.path / f"part-{part:06}.attempts"

    def file(self, part: int) -> StoragePath:
        """Where a part lies."""
        return self.path / f"part-{part:06}.parquet"

    def check(self) -> None:
        """Raise UserError where the folder holds something that is not of this identity."""
        job = f"jobs.{self.identity['kind']}"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output '{self.path}' is a file, not a folder")
        if not self._record.is_file():
            if self.path.exists() and any(not p.name.startswith(self._record.name) for p in self.path.iterdir()):
                raise UserError(f"output '{self.path}' is not empty and holds nothing of {job}: choose another folder")
            return
        there = json.loads(self._record.read_text())
        for key, text in _DIFFERENCES.items():
            if there.get(key) != self.identity.get(key):
                text = text.format(**{**there, "there": there.get(key), "here": self.identity.get(key)})
                raise UserError(f"what lies in '{self.path}' {text}: choose another output, or delete that folder")

    def begin(self) -> None:
        """Make the folder, say whose it is, and clear away what a crash left half written."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in (*self.path.glob("*.partial-*"), *self.path.glob("*.attempts")):
            left.unlink()
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

    def note_attempt(self, number: int) -> None:
        """Count that a worker begins a part. Raises UserError where it has cost others their lives, and would go on."""
        if append(self._attempts(number), b".") > _MOST_ATTEMPTS:
            raise UserError(
                f"{_MOST_ATTEMPTS} workers in a row were lost with part {number}, most likely for lack of memory: "
                f"lower batch_size, or cluster.num_workers"
            )

    def write(self, number: int, part: Part) -> None:
        """Write a part, whole and then named."""
        meta = {**self.identity, "part": number, "tally": part.tally}
        table = part.table.replace_schema_metadata({_KEY: json.dumps(meta)})
        texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
        with whole_file(self.file(number)) as target:
            pq.write_table(table, target, compression="zstd", use_dictionary=texts)
        self._attempts(number).unlink(missing_ok=True)

    def read_summary(self) -> dict[str, Any] | None:
        """What `write_summary` kept, where every part is still there; None for an output that is not complete."""
        if not (self.path / _SUMMARY).is_file():
            return None
        names = {path.name for path in self.path.glob("part-*.parquet")}
        if any(self.file(part).name not in names for part in range(self.num_parts)):
            return None
        return json.loads((self.path / _SUMMARY).read_text())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Keep what the job came to; from then on it is complete."""
        write_json(self.path / _SUMMARY, summary)


def open_complete(path: StoragePath, kind: str) -> tuple[PartitionedOutput, dict[str, Any]]:
    """A complete output of a job and its summary. Raises UserError where there is none, or it is not complete."""
    if not (path / f"{kind}.json").is_file():
        raise UserError(f"'{path}' holds nothing of jobs.{kind}")
    identity = json.loads((path / f"{kind}.json").read_text())
    try:
        num_parts = json.loads((path / _SUMMARY).read_text())["parts"]
    except FileNotFoundError:
        raise UserError(f"'{path}' is not complete: run its jobs.{kind} again to the end") from None
    folder = PartitionedOutput(path, identity, num_parts)
    summary = folder.read_summary()
    if summary is None:
        raise UserError(f"'{path}' has lost some of its {num_parts:,} parts: run its jobs.{kind} again")
    return folder, summary


def plan_parts(manifest: Manifest, part_samples: int) -> list[range]:
    """The chunks of every part: a chunk is in the part that its first sample falls into."""
    ends = manifest.num_samples.cumsum(dtype=np.int64)
    first = (ends - manifest.num_samples) // part_samples
    starts = np.flatnonzero(np.diff(first, prepend=-1)).tolist()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(manifest)], strict=True)]


def add(tallies: Iterable[Tally]) -> Tally:
    """The sum of tallies, the largest counts of a group first."""
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
    """As in "12 no_caption, 3 image_undecodable"."""
    return ", ".join(f"{count:,} {cause}" for cause, count in tally["causes"].items())


def check_bad(tally: Tally, max_bad_fraction: float) -> None:
    """Raise UserError where more of the samples have an error than is allowed."""
    bad, samples = tally["rows"]["bad"], tally["rows"]["samples"]
    if bad > max_bad_fraction * samples:
        raise UserError(
            f"{bad:,} of {samples:,} samples cannot be used ({format_causes(tally)}); "
            f"max_bad_fraction allows {max_bad_fraction:.0%}"
        )
