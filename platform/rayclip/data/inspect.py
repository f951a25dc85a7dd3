"""What is in a shard, before anyone trains on it: which samples can be read, and of those that cannot, why.

Samples are read as training reads them and put to the same tests, so that what is said here is what training meets.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from rayclip.data.captions import choose_caption
from rayclip.data.decode import BadSampleError, check_image, image_bytes, read_caption
from rayclip.data.formats import FORMATS, Layout, Sample, Shard, Span, table, tar
from rayclip.data.formats.base import IMAGE_EXTENSIONS
from rayclip.io.files import describe_impostor
from rayclip.io.storage import download, is_remote

_NUM_EXAMPLES = 3
_PICTURE, _CAPTION = 1, 2


@dataclass
class ShardReport:
    """What was found in a shard beside samples that are fine."""

    causes: dict[str, int] = field(default_factory=dict)
    """How many samples training will skip, by cause (data/decode.py)."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of them, by cause, and of repeated keys, as "repeated_key"."""
    num_absent: int = 0
    """Rows without a picture, which are no samples."""
    num_ignored: int = 0
    """Files that macOS or Windows left, which are no samples."""
    num_repeats: int = 0
    """Samples with a key that an earlier one of the shard has."""
    notes: list[str] = field(default_factory=list)
    """What else is to be known, a line each."""
    problem: str | None = None
    """What is wrong with a shard that is not whole."""
    careful: bool = False
    """Whether it must be read with `Layout.careful`."""
    keys: np.ndarray | None = None
    """Hashes of the keys of a tar's samples, each once, uint64 [num_keys]; the manifest does not keep them."""

    def to_dict(self) -> dict[str, Any]:
        """What is not as in a shard that is fine; empty for such a one."""
        plain = asdict(replace(self, keys=None))
        return {name: value for name, value in plain.items() if value}

    def add(self, cause: str, name: str) -> None:
        """Count a sample that cannot be read."""
        self.causes[cause] = self.causes.get(cause, 0) + 1
        self.add_example(cause, name)

    def add_example(self, kind: str, name: str) -> None:
        """Keep the name of a sample as an example, of the first few."""
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(name)


def inspect_shard(
    shard: Shard, chunk_samples: int, layout: Layout, salvage: bool = False, check: str = "decode"
) -> tuple[list[Span], ShardReport]:
    """The chunks of a shard and what was found in it. Raises OSError for one that is not whole, but to `salvage`.

    `check` says how far pictures are looked at: decode (at the smallest scale), header, or none, which reads no sample.
    """
    layout, report = replace(layout, careful=True), ShardReport()
    with _on_this_machine(shard, layout, check) as near:
        try:
            if layout.kind == "tar":
                spans = _list_tar(near, chunk_samples, layout, salvage, report)
            elif layout.kind == "table":
                spans = _list_table(near, chunk_samples, layout, report)
            else:
                spans = FORMATS[layout.kind].list_chunks(near, chunk_samples, layout)
            if check != "none":
                spans = list(_inspect_spans(near, spans, layout, check == "decode", report))
        except OSError as error:
            if near.path == shard.path:
                raise
            raise OSError(str(error).replace(near.path, shard.path)) from None
        report.problem = report.problem and report.problem.replace(near.path, shard.path)
    return spans, report


@contextmanager
def _on_this_machine(shard: Shard, layout: Layout, check: str) -> Iterator[Shard]:
    """The shard; of a tar in S3 that is to be read whole a copy, since it is read twice."""
    if layout.kind != "tar" or check == "none" or not is_remote(shard.path):
        yield shard
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "shard.tar"
        download(shard.path, copy)
        yield Shard(str(copy), shard.size)


def _list_tar(shard: Shard, chunk_samples: int, layout: Layout, salvage: bool, report: ShardReport) -> list[Span]:
    found = tar.list_whole_chunks(shard, chunk_samples, layout)
    if found.problem and not salvage:
        raise OSError(found.problem)
    report.problem, report.num_ignored, report.num_repeats = found.problem, found.num_ignored, found.num_repeats
    report.careful = bool(found.num_ignored or found.num_repeats)
    return found.spans


def _list_table(shard: Shard, chunk_samples: int, layout: Layout, report: ShardReport) -> list[Span]:
    found = table.survey(shard, chunk_samples, layout)
    report.careful = table.needs_care(shard, found.spans, layout)
    if found.num_strays:
        report.notes.append(
            f"{count(found.num_strays, 'quote')} at the start of a field without one at its end: read as a character"
        )
    if found.num_malformed:
        lines = ", ".join(f"{line:,}" for line in found.malformed_lines)
        report.notes.append(
            f"{count(found.num_malformed, 'row')} with more fields than the header skipped, on line {lines}"
            f"{' and others' * (found.num_malformed > len(found.malformed_lines))}: "
            "put a caption that holds the separator in quotes"
        )
    return found.spans


def _inspect_spans(
    shard: Shard, spans: Sequence[Span], layout: Layout, decode: bool, report: ShardReport
) -> Iterator[Span]:
    """The spans, with as many samples as they have."""
    order = _KeyOrder()
    impostors: Counter[str] = Counter()
    for span in spans:
        try:
            samples = FORMATS[layout.kind].read_chunk(shard, span, layout)
        except OSError:
            report.causes["chunk_unreadable"] = report.causes.get("chunk_unreadable", 0) + span.num_samples
            report.add_example("chunk_unreadable", f"bytes {span.offset:,} to {span.offset + span.length:,}")
            yield span
            continue
        if layout.kind == "parquet":
            report.num_absent += span.num_samples - len(samples)
            report.careful |= len(samples) < span.num_samples
            span = span._replace(num_samples=len(samples))
        for _ in range(span.num_samples - len(samples)):
            report.add("sample_missing", f"after byte {span.offset:,}")
        for sample in samples[: span.num_samples]:
            _inspect_sample(sample, decode, report, impostors)
            if layout.kind == "tar":
                order.add(sample)
        if span.num_samples:
            yield span
    if layout.kind == "tar":
        order.report(report)
    report.notes += [f"{count(times, 'picture')}: {what}" for what, times in impostors.items()]


def _inspect_sample(sample: Sample, decode: bool, report: ShardReport, impostors: Counter[str]) -> None:
    try:
        sample = choose_caption(sample, {}, 0.0)
        read_caption(sample)
        check_image(image_bytes(sample), decode)
    except BadSampleError as error:
        report.add(error.cause, _name(sample))
        if error.cause == "image_undecodable":
            what = describe_impostor(image_bytes(sample))
            impostors.update([what] if what else [])


class _KeyOrder:
    """The keys of a tar's samples, one after another: which come again, and which have their files apart."""

    def __init__(self) -> None:
        self._parts: dict[bytes, int] = {}
        """What there was under each key: a picture, a caption, both."""
        self._repeats: list[str] = []
        self._num_repeats = self._num_apart = self._num_dotted = 0
        self._apart = self._dotted = ""

    def add(self, sample: Sample) -> None:
        """Take the next sample of the tar, in its order."""
        key = sample["__key__"]
        has_image = any(extension in sample for extension in IMAGE_EXTENSIONS)
        here = _PICTURE * has_image | _CAPTION * ("txt" in sample or "json" in sample)
        before = self._parts.get(key)
        if before is not None and here and before and not before & here:
            self._num_apart, self._apart = self._num_apart + 1, self._apart or _name(sample)
        elif before is not None:
            self._num_repeats += 1
            self._repeats = [*self._repeats, _name(sample)][:_NUM_EXAMPLES]
        self._parts[key] = (before or 0) | here
        if not has_image:
            parts = {name: name.rpartition(".") for name in sample}
            dotted = next(
                (name for name, (first, _, last) in parts.items() if first and last in IMAGE_EXTENSIONS), None
            )
            if dotted is not None:
                self._num_dotted, self._dotted = self._num_dotted + 1, self._dotted or f"{_name(sample)}.{dotted}"

    def report(self, report: ShardReport) -> None:
        """Add what was found to the shard's report."""
        report.num_repeats = self._num_repeats
        hashes = [int.from_bytes(blake2b(key, digest_size=8).digest()) for key in self._parts]
        report.keys = np.array(hashes, dtype=np.uint64)
        for name in self._repeats:
            report.add_example("repeated_key", name)
        if self._num_apart:
            report.notes.append(
                f"{count(self._num_apart, 'picture')} and caption do not lie together, as '{self._apart}': sort it, "
                "mkdir x && tar xf SHARD.tar -C x && tar cf SORTED.tar --sort=name -C x ."
            )
        if self._num_dotted:
            report.notes.append(
                f"{count(self._num_dotted, 'sample')} with dots in the names of files, as '{self._dotted}': a sample's "
                "name ends at the first dot, as webdataset splits it, so that the files of several are one sample; "
                "put _ in the place of the other dots"
            )


def count(number: int, what: str) -> str:
    """As in "1 row" and "2 rows"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _name(sample: Sample) -> str:
    return sample["__key__"].decode("utf-8", "replace")
