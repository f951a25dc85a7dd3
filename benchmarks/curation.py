"""Curation of a corpus in which all is known: who is whose copy, what each query finds, what breaks which rule.

Pair i is of kind i mod 20 and its caption holds what its number divides, so that what must come out is arithmetic. The
job is the real one, from tars of pictures to tars of those that stay.
"""

import io
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.config import BenchmarkConfig
from rayclip.config import CurateConfig, WorkersConfig
from rayclip.data.formats.tar import Sample, Span, write_shard
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.orchestration.batch.curate import curate

_CYCLE = 20
_KINDS = {
    0: "no_caption", 1: "caption_short", 2: "caption_long", 3: "caption_not_text", 4: "picture_small",
    5: "picture_long", 6: "image_undecodable", 7: "duplicate_exact", 8: "duplicate_near", 9: "no_query",
}  # fmt: skip
"""What is wrong with every twentieth pair from i on. Copies are of pairs of the cycle before."""

_QUERIES = {"lighthouse": 2, "teapot": 5, "red panda": 11, "narrow gauge": 101}
"""Queries, each in every n-th caption. Where there would be none, it is "lamp"."""

_SHARD, _CHUNK = 10_000, 64


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Seconds and memory. Raises UserError where anything comes out other than it must."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(folder / "old", config.corpus_pairs)
        (folder / "queries.txt").write_text("\n".join([*_QUERIES, "lamp"]))
        started = time.perf_counter()
        summary = curate(
            CurateConfig(
                data=str(folder / "old"), output=str(folder / "new"), queries=str(folder / "queries.txt"), min_side=16,
                pairs_per_query=config.corpus_pairs, max_bad_fraction=0.2,
                cluster=WorkersConfig(num_workers=config.workers),
            )
        )  # fmt: skip
        seconds = time.perf_counter() - started
        queries = pq.read_table(folder / "new" / "queries.parquet").to_pylist()
        outcomes = [
            outcome
            for part in sorted((folder / "new" / "outcomes").glob("part-*.parquet"))
            for outcome in pq.read_table(part)["outcome"].to_pylist()
        ]
        kept = Manifest.load(folder / "new").total_samples
    expected = [_kind(i) for i in range(config.corpus_pairs)]
    _check("outcomes", outcomes, expected)
    _check("pairs that stay", kept, expected.count("kept"))
    _check("pairs of queries", {row["query"]: row["before"] for row in queries}, _found(expected))
    _check("pairs of queries that stay", {row["query"]: row["after"] for row in queries}, _found(expected))
    return {
        "corpus_pairs": config.corpus_pairs,
        "outcomes": summary["outcomes"],
        "pairs_of_queries": _found(expected),
        "seconds": round(seconds, 1),
        "pairs_per_s": round(config.corpus_pairs / seconds),
        "driver_resident_mb": round(psutil.Process().memory_info().rss / 1e6),
    }


def _kind(i: int) -> str:
    kind = _KINDS.get(i % _CYCLE, "kept")
    return "kept" if kind.startswith("duplicate") and i < _CYCLE else kind


def _found(kinds: list[str]) -> dict[str, int]:
    """How many of the pairs that stay hold each query; those that rules leave out are not counted."""
    return dict(Counter(query for i, kind in enumerate(kinds) if kind == "kept" for query in _queries(i)))


def _queries(i: int) -> list[str]:
    return [query for query, n in _QUERIES.items() if i % n == 0] or ["lamp"]


def _check(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise UserError(f"curation is not exact: {what} are other than they must be")


def _write(folder: Path, pairs: int) -> None:
    folder.mkdir()
    shards: list[tuple[str, int, list[Span]]] = []
    for first in range(0, pairs, _SHARD):
        path = folder / f"{len(shards):06}.tar"
        with path.open("wb") as target:
            spans = write_shard(target, _samples(range(first, min(first + _SHARD, pairs))), _CHUNK)
        shards.append((path.name, path.stat().st_size, spans))
    Manifest.from_spans(folder, shards).save()


def _samples(numbers: range) -> Iterator[Sample]:
    for i in numbers:
        sample = {"__key__": f"{i:09}".encode(), "png": _picture(i)}
        yield sample if _kind(i) == "no_caption" else sample | {"txt": _caption(i).encode()}


def _caption(i: int) -> str:
    return {
        "caption_short": "lighthouse",
        "caption_long": "a lighthouse " * 100,
        "caption_not_text": f"lighthouse {i:030}",
        "no_query": "nothing that anyone asked for",
    }.get(_kind(i), f"A {', '.join(_queries(i))}: seen by some{'one' * (i % 3)}")


def _picture(i: int) -> bytes:
    kind = _kind(i)
    # Copies are of the pairs three places on, one cycle before.
    source = i - _CYCLE + 3 if kind.startswith("duplicate") else i
    width, height = {"picture_small": (15, 20), "picture_long": (64, 16)}.get(kind, (20, 20))
    pixels = np.random.default_rng(source).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    # Other bytes that look the same: what a change of pixels does to a hash is no matter of arithmetic.
    Image.fromarray(pixels).save(file, "PNG", compress_level=9 if kind == "duplicate_near" else 1)
    return file.getvalue()[:200] if kind == "image_undecodable" else file.getvalue()
