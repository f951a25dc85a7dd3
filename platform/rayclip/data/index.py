"""From the shards that a data set is made of to its manifest: what is read again, and what was found in them.

Which files those are, and how they are read, is decided in `index_plan`.
"""

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rayclip.config import IndexConfig
from rayclip.data.formats import FORMATS, Layout, Shard
from rayclip.data.formats.base import MissingColumnError
from rayclip.data.index_plan import IndexPlan, find_columns
from rayclip.data.inspect import ShardReport, count, inspect_shard
from rayclip.data.manifest import FILE_NAME, PARTIAL, Chunks, Manifest
from rayclip.errors import UserError
from rayclip.io.files import describe_impostor
from rayclip.io.s3 import File
from rayclip.io.storage import read_range

_NUM_SHOWN = 5
_MOST_KEYS = 20_000_000  # that are compared with each other: 8 bytes each
_IMPOSTOR_BYTES = 256


class Indexed(NamedTuple):
    """A shard that was read, with its chunks, int64 [num_chunks, 3], and what was found in it."""

    name: str
    size: int
    stamp: str
    chunks: np.ndarray
    report: ShardReport

    @property
    def problem(self) -> str | None:
        """What is wrong with a shard that is not whole."""
        return self.report.problem


def index_shard(shard: Shard, chunk_samples: int, layout: Layout) -> Chunks:
    """Return the chunks of one shard. Raises UserError, naming the file, for one that is not whole."""
    try:
        return FORMATS[layout.kind].list_chunks(shard, chunk_samples, layout)
    except OSError as error:
        raise UserError(_describe_error(shard, error)) from None


def index_file(path: str, file: File, layout: Layout, notes: dict[str, object]) -> Indexed:
    """Read a shard and look at its samples, as `notes` say. Raises UserError for one that is not whole, but to salvage.

    One that has no column of pictures at all is passed over; one whose columns have other names is a mistake.
    """
    shard, salvage = Shard(path, file.size), notes["broken"] == "salvage"
    try:
        spans, report = inspect_shard(shard, int(str(notes["chunk_samples"])), layout, salvage, str(notes["check"]))
    except OSError as error:
        spans, report = [], ShardReport(problem=_describe_error(shard, error))
        passed_over = isinstance(error, MissingColumnError) and not find_columns(error.columns, layout.kind)
        if not passed_over and not salvage:
            if isinstance(error, MissingColumnError):
                raise UserError(f"{error}: index such files by themselves, and name both in data.mixture") from None
            raise UserError(str(report.problem)) from None
    return Indexed(*file, np.asarray(spans, dtype=np.int64).reshape(-1, 3), report)


def _describe_error(shard: Shard, error: OSError) -> str:
    text = f"'{shard.path}' cannot be read: {error.strerror}" if error.strerror else str(error)
    try:
        instead = describe_impostor(read_range(shard.path, 0, min(shard.size, _IMPOSTOR_BYTES)))
    except OSError:
        instead = None
    return f"{text}; it is {instead}" if instead else text


def known_shards(plan: IndexPlan, notes: dict[str, object]) -> dict[str, Indexed]:
    """What the last index, complete or not, says of shards that have not changed since, by name."""
    known: dict[str, Indexed] = {}
    now = {file.name: file for file in plan.shards}
    for name in (FILE_NAME, PARTIAL):
        try:
            last = Manifest.load(plan.folder, name)
        except UserError:  # none, or none that could be used
            continue
        same = replace(last.layout, careful=False) == plan.layout and last.root == plan.root
        if same and last.notes == notes and last.stamps:
            known |= {found.name: found for found in _shards_of(last) if found[:3] == now.get(found.name)}
    return known


def _shards_of(manifest: Manifest) -> list[Indexed]:
    chunks = np.stack([manifest.offset, manifest.length, manifest.num_samples], axis=1).astype(np.int64)
    edges = np.searchsorted(manifest.shard, np.arange(len(manifest.shards) + 1))
    rows = zip(manifest.shards, manifest.shard_bytes, manifest.stamps, edges, edges[1:], strict=False)
    reports = manifest.reports or {}
    return [
        Indexed(name, size, stamp, chunks[a:b], ShardReport(**reports.get(name, {})))
        for name, size, stamp, a, b in rows
    ]


def to_manifest(plan: IndexPlan, found: dict[str, Indexed], notes: dict[str, object]) -> Manifest:
    """The manifest of the shards that were found, in the plan's order."""
    chosen = [found[file.name] for file in plan.shards if file.name in found and len(found[file.name].chunks)]
    shards = [(shard.name, shard.size, shard.chunks) for shard in chosen]
    reports = {shard.name: said for shard in chosen if (said := shard.report.to_dict())}
    layout = replace(plan.layout, careful=any(shard.report.careful for shard in chosen))
    more = {"root": plan.root, "stamps": tuple(shard.stamp for shard in chosen), "notes": notes, "reports": reports}
    return Manifest.from_spans(plan.folder, shards, layout, **more)


def summarize(plan: IndexPlan, found: dict[str, Indexed], config: IndexConfig) -> dict[str, Any]:
    """What was found in all shards: {"check", "readable", "unreadable", "examples", "absent", "ignored",
    "repeated_keys", "keys_across_shards", "passed_over", "notes"}; `readable` is None where no sample was looked at.
    Keys are compared across the tars that were read this time: a manifest does not keep them."""
    shards = [found[file.name] for file in plan.shards if file.name in found]
    causes: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    notes = list(plan.notes)
    for shard in shards:
        causes.update(shard.report.causes)
        for kind, names in shard.report.examples.items():
            held = examples.setdefault(kind, [])
            held += [f"{shard.name}/{name}" for name in names][: _NUM_SHOWN - len(held)]
    said = [f"'{shard.name}': {note}" for shard in shards for note in shard.report.notes]
    notes += said[:_NUM_SHOWN] + [f"and {len(said) - _NUM_SHOWN:,} notes more of this kind"] * (len(said) > _NUM_SHOWN)
    samples = sum(int(shard.chunks[:, 2].sum()) for shard in shards)
    return {
        "check": config.check,
        "readable": None if config.check == "none" else samples - causes.total(),
        "unreadable": dict(causes.most_common()),
        "examples": examples,
        "absent": sum(shard.report.num_absent for shard in shards),
        "ignored": plan.num_ignored + sum(shard.report.num_ignored for shard in shards),
        "repeated_keys": sum(shard.report.num_repeats for shard in shards),
        "keys_across_shards": _keys_across(shards),
        "passed_over": plan.passed_over,
        "notes": notes,
    }


def _keys_across(shards: list[Indexed]) -> dict[str, Any]:
    """How many samples of the tars that were read have a key that one of another tar has, and two such tars."""
    names, keys, total = list[str](), list[np.ndarray](), 0
    for shard in shards:
        total += 0 if shard.report.keys is None else len(shard.report.keys)
        if shard.report.keys is not None and total <= _MOST_KEYS:
            names.append(shard.name)
            keys.append(shard.report.keys)
    if not keys:
        return {"samples": 0, "compared": 0, "example": []}
    key = np.concatenate(keys)
    shard_of = np.repeat(np.arange(len(keys)), [len(of_one) for of_one in keys])
    order = np.argsort(key, kind="stable")
    again = np.flatnonzero(key[order][1:] == key[order][:-1])
    example = [names[shard_of[order[again[0] + i]]] for i in (0, 1)] if len(again) else []
    return {"samples": len(again), "compared": len(keys), "example": example}


def describe_findings(summary: dict[str, Any]) -> list[str]:
    """The lines that `index` prints of what it found, from its summary."""
    lines = []
    if summary["readable"] is not None:
        looked = "decoded" if summary["check"] == "decode" else "by the pictures' headers alone"
        lines.append(f"{summary['readable']:,} of {summary['samples']:,} samples can be read ({looked})")
    for cause, number in summary["unreadable"].items():
        lines.append(f"{number:,} {cause}{_like(summary, cause)}: training will skip them")
    if summary["repeated_keys"]:
        lines.append(
            f"{count(summary['repeated_keys'], 'sample')} with the key of an earlier one of the shard"
            f"{_like(summary, 'repeated_key')}: each is a sample by itself"
        )
    across = summary["keys_across_shards"]
    if across["samples"]:
        among = f" of {across['compared']:,} compared" * (across["compared"] < summary["shards"])
        lines.append(
            f"{count(across['samples'], 'sample')} with the key of one in another shard{among}, as in "
            f"'{across['example'][0]}' and '{across['example'][1]}': each is a sample by itself"
        )
    if summary["absent"]:
        lines.append(f"{count(summary['absent'], 'row')} without a picture: no samples")
    if summary["ignored"]:
        lines.append(f"{count(summary['ignored'], 'file')} of macOS or Windows ignored, as ._NAME")
    if summary["passed_over"]:
        others = ", ".join(f"{number:,} {ending}" for ending, number in summary["passed_over"].items())
        lines.append(f"other files that are no part of it: {others}")
    return [*lines, *summary["notes"], *summary["problems"]]


def _like(summary: dict[str, Any], kind: str) -> str:
    names = summary["examples"].get(kind, ())[:2]
    return f", as {' and '.join(names)}" if names else ""
