"""A corpus for curation in which everything is known: who is whose copy, what each query finds, what breaks which rule.

It is written by its own arithmetic: pair i is of kind i mod 20, and copies come after all originals.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from rayclip.data.curation.sample_stats import SCHEMA

KINDS = {
    0: "no_caption", 1: "caption_short", 2: "caption_long", 3: "caption_not_text", 4: "picture_small",
    5: "picture_long", 6: "score_low", 7: "duplicate_exact", 8: "duplicate_near", 9: "no_query",
}  # fmt: skip
"""What is wrong with every twentieth pair from i on; pairs of other kinds are for the balance."""

QUERIES = {"lighthouse": 2, "teapot": 5, "red panda": 11, "narrow gauge": 101}
"""Queries, each in every n-th caption. Where there would be none, it is "lamp"."""


@dataclass(frozen=True)
class Corpus:
    """The pairs as `look` would see them, their scores, and what is known of them."""

    seen: pa.Table
    scores: np.ndarray
    kinds: list[str]
    queries: list[str]
    query_counts: list[int]


def build_corpus(num_pairs: int) -> Corpus:
    """Kinds in turn, but copies last: they are of the first good pairs."""
    kinds = [KINDS.get(i % 20, "balanced") for i in range(num_pairs)]
    order = sorted(range(num_pairs), key=lambda i: kinds[i].startswith("duplicate"))
    kinds = [kinds[i] for i in order]
    hashes = np.random.default_rng(0).integers(0, 2**64, num_pairs, dtype=np.uint64)
    good = [i for i, kind in enumerate(kinds) if kind == "balanced"]
    rows = []
    for i, kind in enumerate(kinds):
        source = good[i % len(good)] if kind.startswith("duplicate") else i
        exact = source if kind == "duplicate_exact" else i
        # Three bits of different bands for each copy.
        near = hashes[source] ^ np.uint64(0b1 << (i % 64) | 1 << ((i + 17) % 64) | 1 << ((i + 35) % 64))
        content = (
            caption_of(i, kind), *size_of(kind), blake2b(f"{exact}".encode(), digest_size=16).digest(),
            int(near if kind == "duplicate_near" else hashes[source]),
        )  # fmt: skip
        fine = kind != "no_caption"
        rows.append((f"0.tar/{i}", i // 64, i % 64, None if fine else kind, *(content if fine else [None] * 5)))
    seen = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCHEMA)
    scores = np.array([0.1 if kind == "score_low" else 0.3 for kind in kinds], dtype=np.float32)
    counts = [sum(i % n == 0 for i in good) for n in QUERIES.values()]
    counts.append(sum(all(i % n for n in QUERIES.values()) for i in good))
    return Corpus(seen, scores, kinds, [*QUERIES, "lamp"], counts)


def caption_of(number: int, kind: str) -> str:
    """A caption that holds what it should."""
    found = ", ".join(query for query, n in QUERIES.items() if number % n == 0) or "lamp"
    return {
        "caption_short": "lighthouse",
        "caption_long": "a lighthouse " * 100,
        "caption_not_text": f"lighthouse {number:030}",
        "no_query": "nothing that anyone asked for",
    }.get(kind, f"A {found}: seen by some{'one' * (number % 3)}")


def size_of(kind: str) -> tuple[int, int]:
    """Width and height."""
    return {"picture_small": (31, 40), "picture_long": (200, 60)}.get(kind, (48, 40))
