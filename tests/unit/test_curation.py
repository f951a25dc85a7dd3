"""Curation's parts beside loops over all pairs, and its rules over a corpus whose duplicates and queries are known."""

import io
import math
import re
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.workload import jpegs
from rayclip.config import CurateConfig
from rayclip.data.curation.balance import count_pairs, keep_probability
from rayclip.data.curation.decide import OUTCOMES, decide, letter_share
from rayclip.data.curation.duplicates import HASH_SIDE, first_of_each, first_of_near, near_pairs, perceptual_hash
from rayclip.data.curation.queries import Matcher, Miner, read_queries
from rayclip.data.curation.sample_stats import SCHEMA, SampleStats, sample_stats
from rayclip.errors import UserError
from tests.unit.curation_corpus import build_corpus

word = st.sampled_from(["a", "ab", "b", "cat", "the", "é", "中", "7"])
phrase = st.lists(word, min_size=1, max_size=3).map(" ".join)


@given(st.lists(phrase, min_size=1, max_size=8, unique=True), st.lists(word, max_size=12))
def test_matches_are_those_of_a_loop_over_all_queries(queries, caption):
    caption = ", ".join(caption).upper()
    text = re.sub(r"\W+", " ", f" {caption} ".lower())
    expected = [number for number, query in enumerate(queries) if f" {query} " in text]
    assert Matcher(queries)(caption) == expected


def test_queries_that_cannot_be_told_apart_are_refused():
    with pytest.raises(UserError, match="'Cat!' is there twice"):
        Matcher(["cat", "Cat!"])
    with pytest.raises(UserError, match="holds no word"):
        Matcher(["..."])


def test_a_file_of_queries(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("Red Panda\n\n  cat \nred-panda\n...\n")
    assert read_queries(path) == ["Red Panda", "cat"]
    path.write_text("\n")
    with pytest.raises(UserError, match="holds none"):
        read_queries(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_queries(tmp_path / "missing.txt")


def test_mined_queries_are_frequent_words_and_pairs_that_belong_together():
    captions = ["the red panda sleeps", "a red panda in the tree", "the Red Panda", "the tree", "a red tree"] * 3
    miner = Miner()
    miner.add(captions)
    text = [caption.lower().split() for caption in captions]
    count = Counter(word for caption in text for word in caption)
    pairs = Counter(pair for caption in text for pair in pairwise(caption))
    total = sum(count.values())
    expected = {w for w, c in count.items() if c >= 5} | {
        f"{a} {b}"
        for (a, b), c in pairs.items()
        if c >= 5 and math.log2((c / total) / (count[a] / total * count[b] / total)) >= 2
    }
    assert set(miner.queries(5, 2.0, 100)) == expected
    assert "red panda" in expected and "the red" not in expected
    assert miner.queries(5, 2.0, 2) == ["red", "the"]


@settings(deadline=None)
@given(st.integers(0, 8), st.integers(0, 2**32))
def test_near_hashes_are_those_of_a_loop_over_all_pairs(max_distance, seed):
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, 20, dtype=np.uint64)
    flips = [
        sum(1 << int(b) for b in generator.choice(64, generator.integers(0, 11), replace=False)) for _ in range(40)
    ]
    hashes = np.unique(
        np.concatenate([hashes, hashes[generator.integers(0, 20, 40)] ^ np.array(flips, dtype=np.uint64)])
    )
    near = {
        (a, b)
        for a in range(len(hashes))
        for b in range(a)
        if (int(hashes[a]) ^ int(hashes[b])).bit_count() <= max_distance
    }
    assert {(max(a, b), min(a, b)) for a, b in zip(*near_pairs(hashes, max_distance), strict=True)} == near


def test_the_first_of_a_chain_stays():
    hashes = np.array([0b1111, 0b111 << 40, 0b0000, 0b0011, 0b111 << 40, 0b111 << 60], dtype=np.uint64)
    assert first_of_near(hashes, 2).tolist() == [True, True, False, False, False, True]
    assert first_of_near(hashes, 0).tolist() == [True, True, True, True, False, True]
    assert first_of_near(hashes[:0], 2).tolist() == []
    assert first_of_each(np.array([3, 1, 3, 1, 2])).tolist() == [True, True, False, False, True]


def test_the_same_picture_in_another_size_and_quality_is_near():
    def hashed(image):
        return perceptual_hash(np.asarray(image.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BICUBIC)))

    originals, hashes = [], []
    for data in jpegs(256, 12):
        image = Image.open(io.BytesIO(data))
        changed = io.BytesIO()
        image.resize((180, 180), Image.Resampling.BILINEAR).point(lambda v: v * 0.9 + 10).save(
            changed, "JPEG", quality=60
        )
        originals.append(hashed(image))
        hashes.append((originals[-1] ^ hashed(Image.open(changed))).bit_count())
    assert np.mean(hashes) < 2 and max(hashes) <= 4
    apart = [(a ^ b).bit_count() for i, a in enumerate(originals) for b in originals[:i]]
    assert min(apart) > 10


@given(st.lists(st.lists(st.integers(0, 5), unique=True, max_size=4), min_size=1, max_size=20), st.integers(1, 6))
def test_a_pair_is_kept_by_the_chance_of_its_rarest_query(found, most):
    matches, offsets = np.array(list(chain(*found)), dtype=np.int32), np.cumsum([0, *map(len, found)])
    counts = count_pairs(matches, offsets, np.ones(len(found), dtype=bool), 6)
    assert counts.tolist() == [sum(q in numbers for numbers in found) for q in range(6)]
    expected = [max((min(1, most / counts[q]) for q in numbers), default=0) for numbers in found]
    assert keep_probability(matches, offsets, counts, most).tolist() == expected


@pytest.mark.parametrize(
    ("text", "share"), [("a b", 1.0), ("中文 说明", 1.0), ("IMG_0234.jpg", 6 / 12), ("12 34", 0.0), ("", 0.0)]
)
def test_letters_of_any_script_count(text, share):
    assert letter_share(text) == share


def test_looking_at_a_sample():
    data = jpegs(256, 1)[0]
    seen = sample_stats({"jpg": data, "txt": b" a caption "})
    assert (seen.cause, seen.caption, seen.width, seen.height) == (None, "a caption", 256, 256)
    assert sample_stats({"jpg": data}).cause == "no_caption"
    assert sample_stats({"jpg": data[:500], "txt": b"x"}) == SampleStats("image_undecodable")
    assert sample_stats(None).cause == "sample_missing"


def config(**changes):
    return CurateConfig(data="x", output="y", **{"pairs_per_query": 50, "min_side": 32, "max_distance": 3} | changes)


@pytest.fixture(scope="module")
def corpus():
    return build_corpus(20_000)


def test_every_outcome_of_a_known_corpus(corpus, tmp_path):
    check_outcomes(corpus, tmp_path)


def test_every_outcome_of_a_large_known_corpus(tmp_path):
    check_outcomes(build_corpus(200_000), tmp_path)


def check_outcomes(corpus, tmp_path):
    """Causes and counts exactly; what is drawn, within five standard deviations of its chances."""
    (tmp_path / "queries.txt").write_text("\n".join(corpus.queries))
    decision = decide(corpus.seen, config(queries=str(tmp_path / "queries.txt")), corpus.scores)
    got = [OUTCOMES[code] for code in decision.outcome_N]
    expected = corpus.kinds
    drawn = {"kept", "not_sampled"}
    assert [g for g in got if g not in drawn] == [e for e in expected if e != "balanced"]
    assert all((g in drawn) == (e == "balanced") for g, e in zip(got, expected, strict=True))
    assert decision.before_Q.tolist() == corpus.query_counts
    # Beside the sum of the chances, taken pair by pair from the captions' own text.
    chance = dict(zip(corpus.queries, (min(1, 50 / count) for count in corpus.query_counts), strict=True))
    texts = corpus.seen["caption"].to_pylist()
    found = [[q for q in corpus.queries if q in t] for t, k in zip(texts, expected, strict=True) if k == "balanced"]
    for query, after in zip(corpus.queries, decision.after_Q, strict=True):
        chances = np.array([max(chance[q] for q in queries) for queries in found if query in queries])
        assert abs(after - chances.sum()) <= 5 * (chances * (1 - chances)).sum() ** 0.5
        assert after >= min(50, len(chances)) * 0.5


def test_who_is_drawn_depends_on_the_pair_alone(corpus, tmp_path):
    (tmp_path / "queries.txt").write_text("\n".join(corpus.queries))
    settings_ = config(queries=str(tmp_path / "queries.txt"), pairs_per_query=20)
    once = decide(corpus.seen, settings_).outcome_N
    shuffled = np.random.default_rng(0).permutation(len(corpus.seen))
    # What is the first of its kind depends on the order, so only pairs that are no copies can be compared.
    again = decide(corpus.seen.take(shuffled), settings_).outcome_N
    same = once[shuffled] == again
    copy = [OUTCOMES.index(o) for o in ("duplicate_exact", "duplicate_near")]
    copies = np.isin(again, copy) | np.isin(once[shuffled], copy)
    assert same[~copies].mean() > 0.95
    other = decide(corpus.seen, config(queries=settings_.queries, pairs_per_query=20, seed=1)).outcome_N
    assert (once != other).any()


def test_without_queries_they_are_mined(corpus):
    decision = decide(corpus.seen, config(min_count=30, min_pmi=3.0, keep_unmatched=True))
    assert set(corpus.queries) <= set(decision.queries)
    assert "no_query" not in decision.counts()
    with pytest.raises(UserError, match="lower min_count"):
        decide(corpus.seen, config(min_count=10**6))


def test_an_empty_corpus_of_unreadable_samples():
    seen = pa.table([["s/a"], [0], [0], ["no_image"], *[[None]] * 5], schema=SCHEMA)
    with pytest.raises(UserError, match="no word occurs"):
        decide(seen, config())
