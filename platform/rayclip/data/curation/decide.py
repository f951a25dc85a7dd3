"""Which pairs stay. Every pair that does not has one cause: the first of the rules, in their order, that it breaks.

A pure function of what was seen (`look.SCHEMA`), the settings and the scores: it is made anew wherever it is needed.
Shapes: N pairs; Q queries; M matches.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayclip.config import CurateConfig
from rayclip.data.curation.balance import count_pairs, keep_probability
from rayclip.data.curation.duplicates import first_of_each, first_of_near
from rayclip.data.curation.queries import Matcher, Miner, read_queries, words
from rayclip.data.decode import CAUSES
from rayclip.data.order import uniform
from rayclip.errors import UserError

RULES = (
    "caption_short",
    "caption_long",
    "caption_not_text",
    "picture_small",
    "picture_long",
    "score_low",
    "duplicate_exact",
    "duplicate_near",
    "no_query",
    "not_sampled",
)
"""Why a pair that can be read is left out."""

OUTCOMES = ("kept", *CAUSES[1:], *RULES)
"""What becomes of a pair; its index in this tuple is the code of a decision."""

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Decision:
    """What becomes of each pair, and what each query finds: among all pairs that the rules before leave, and of those
    that stay."""

    outcome_N: np.ndarray
    queries: list[str]
    before_Q: np.ndarray
    after_Q: np.ndarray

    def counts(self) -> dict[str, int]:
        """Pairs by outcome, in the order of OUTCOMES, without those that did not occur."""
        counts = np.bincount(self.outcome_N, minlength=len(OUTCOMES)).tolist()
        return {outcome: count for outcome, count in zip(OUTCOMES, counts, strict=True) if count}


def decide(seen: pa.Table, config: CurateConfig, score_N: np.ndarray | None = None) -> Decision:
    """Apply the rules. `score_N` are cosines; a pair without one, NaN, is left out as low. Raises UserError."""
    outcome_N = _unreadable(seen)
    left = np.flatnonzero(outcome_N == 0)

    def drop(rule: str, good: np.ndarray) -> None:
        nonlocal left
        outcome_N[left[~good]] = OUTCOMES.index(rule)
        left = left[good]

    def column(name: str) -> np.ndarray:
        return seen[name].take(left).to_numpy()

    def captions() -> list[str]:
        return seen["caption"].take(left).to_pylist()

    drop("caption_short", _each(captions(), lambda text: len(words(text)) >= config.min_words))
    drop("caption_long", _each(captions(), lambda text: len(text) <= config.max_characters))
    drop("caption_not_text", _each(captions(), lambda text: letter_share(text) >= config.min_letters))
    drop("picture_small", np.minimum(column("width"), column("height")) >= config.min_side)
    aspect = np.maximum(column("width"), column("height")) / np.minimum(column("width"), column("height"))
    drop("picture_long", aspect <= config.max_aspect)
    if score_N is not None:
        drop("score_low", score_N[left] >= config.min_score)
    drop("duplicate_exact", first_of_each(column("digest").astype("V16")))
    if config.max_distance is not None:
        drop("duplicate_near", first_of_near(column("hash"), config.max_distance))

    queries = read_queries(config.queries) if config.queries else _mine(captions(), config)
    matches_M, offsets = _match(captions(), queries)
    before_Q = count_pairs(matches_M, offsets, np.ones(len(left), dtype=bool), len(queries))
    probability = keep_probability(matches_M, offsets, before_Q, config.pairs_per_query)
    found = np.diff(offsets) > 0
    name_hashes = np.array([_name_hash(name) for name in seen["id"].take(left).to_pylist()], dtype=np.uint64)
    sampled = (uniform(config.seed, name_hashes) < probability) | (~found & config.keep_unmatched)
    after_Q = count_pairs(matches_M, offsets, sampled, len(queries))
    outcome_N[left[~sampled & ~found]] = OUTCOMES.index("no_query")
    outcome_N[left[~sampled & found]] = OUTCOMES.index("not_sampled")
    return Decision(outcome_N, queries, before_Q, after_Q)


def letter_share(text: str) -> float:
    """The share of letters, of any script, among what is not white space: no language is preferred."""
    solid = _SPACE.sub("", text)
    return sum(map(str.isalpha, solid)) / max(1, len(solid))


def _unreadable(seen: pa.Table) -> np.ndarray:
    index = pc.index_in(seen["cause"], pa.array(OUTCOMES))
    return pc.fill_null(index, 0).to_numpy().astype(np.int8)


def _each(captions: Iterable[str], good: Callable[[str], bool]) -> np.ndarray:
    return np.fromiter(map(good, captions), dtype=bool)


def _mine(captions: list[str], config: CurateConfig) -> list[str]:
    miner = Miner()
    miner.add(captions)
    queries = miner.queries(config.min_count, config.min_pmi, config.max_queries)
    if not queries:
        raise UserError(f"no word occurs {config.min_count:,} times in the captions: lower min_count, or give queries")
    return queries


def _match(captions: list[str], queries: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the queries in all captions, int32 [M], and where those of each caption begin, int64 [N + 1]."""
    found = list(map(Matcher(queries), captions))
    offsets = np.concatenate([[0], np.cumsum([len(numbers) for numbers in found], dtype=np.int64)])
    return np.fromiter(chain.from_iterable(found), dtype=np.int32), offsets


def _name_hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
