"""The stream over a small data set on disk: what a batch holds, what a restart streams, what a bad sample becomes."""

import io
import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rayclip.data.decode import CAUSES, GUARD_CAUSES
from rayclip.data.formats.tar import write_shard
from rayclip.data.ledger import Ledger
from rayclip.data.manifest import Manifest
from rayclip.data.order import uniform
from rayclip.data.stream import Stream, StreamSpec
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from tests.broken_corpus import png

NUM_SAMPLES = 33
DTYPES = {
    "image": np.uint8,
    "tokens": np.int32,
    "num_tokens": np.int32,
    "position": np.int64,
    "row": np.int32,
    "cause": np.int8,
}


def make_spec(manifest, **changes):
    spec = StreamSpec(
        folder=manifest.folder,
        digest=manifest.digest,
        seed=5,
        end=2 * len(manifest) + 3,
        window=4,
        image_size=16,
        context_length=12,
        crop_scale=(0.5, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
    )
    return replace(spec, **changes)


@pytest.fixture(scope="module")
def samples(make_samples):
    return make_samples(NUM_SAMPLES)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, samples, write_dataset):
    return write_dataset(tmp_path_factory.mktemp("stream"), samples)


@pytest.fixture(scope="module")
def whole(manifest):
    """The uninterrupted stream, over two epochs and a part of the third."""
    return joined(Stream(make_spec(manifest)).batches(7))


def joined(batches):
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def chunk_start(manifest, chunk):
    return int(manifest.num_samples[:chunk].sum())


def as_rows(batch, keep=slice(None)):
    return [tuple(np.asarray(batch[name][i]).tobytes() for name in DTYPES) for i in range(len(batch["row"]))[keep]]


# What a batch holds


def test_a_batch_keeps_the_contract(manifest):
    for batch in Stream(make_spec(manifest)).batches(7):
        size = len(batch["row"])
        assert {name: array.dtype for name, array in batch.items()} == DTYPES
        assert batch["image"].shape == (size, 16, 16, 3)
        assert batch["tokens"].shape == (size, 12)
        assert batch["num_tokens"].shape == batch["position"].shape == batch["cause"].shape == (size,)
        assert not batch["cause"].any()


def test_all_batches_are_full_but_the_last(manifest, whole):
    sizes = [len(batch["row"]) for batch in Stream(make_spec(manifest)).batches(7)]
    assert set(sizes[:-1]) == {7}
    assert 0 < sizes[-1] < 7
    assert sum(sizes) == len(whole["row"])


@pytest.mark.parametrize("batch_size", [1, 33, 1000])
def test_the_batch_size_changes_nothing_else(manifest, whole, batch_size):
    assert as_rows(joined(Stream(make_spec(manifest)).batches(batch_size))) == as_rows(whole)


def test_every_epoch_holds_every_sample_once(manifest, whole):
    stream = Stream(make_spec(manifest))
    for epoch in range(2):
        here = whole["position"] // len(manifest) == epoch
        chunks = stream.order.chunks(whole["position"][here])
        numbers = [chunk_start(manifest, c) + int(r) for c, r in zip(chunks, whole["row"][here], strict=True)]
        assert sorted(numbers) == list(range(NUM_SAMPLES))


def chunks_of(spec):
    """The chunks of the whole data set that a stream reads, by their place in it, for each epoch."""
    whole = Manifest.load(spec.folder)
    at = {(s, o): i for i, (s, o) in enumerate(zip(whole.shard.tolist(), whole.offset.tolist(), strict=True))}
    stream, epochs = Stream(spec), []
    for start in range(0, spec.end, len(stream.manifest)):
        chunks = stream.order.chunks(np.arange(start, min(start + len(stream.manifest), spec.end)))
        epochs.append([at[int(stream.manifest.shard[c]), int(stream.manifest.offset[c])] for c in chunks])
    return epochs


def test_a_share_of_the_data_is_fixed_and_the_smaller_lies_within_the_larger(manifest):
    shares = [0.01, 0.3, 0.5, 0.75, 1.0]
    subsets = []
    for fraction in shares:
        num_chunks = len(manifest.subset(fraction, 5))
        first, second = chunks_of(make_spec(manifest, fraction=fraction, end=2 * num_chunks))
        assert len(set(first)) == len(first) == num_chunks == max(1, round(fraction * len(manifest)))
        assert set(first) == set(second)
        subsets.append(set(first))
    assert all(small < large for small, large in itertools.pairwise(subsets))
    seeds = {frozenset(chunks_of(make_spec(manifest, fraction=0.5, end=4, seed=seed))[0]) for seed in range(8)}
    assert len(seeds) > 1


def test_a_share_is_streamed_once_an_epoch_and_goes_on_after_a_restart(manifest):
    half = manifest.subset(0.5, 5)
    spec = make_spec(manifest, fraction=0.5, end=Stream.position_at(half, 5, 2 * half.total_samples))
    batches = list(Stream(spec).batches(4))
    samples = Counter(identity(spec, batch, i) for batch in batches for i in range(len(batch["row"])))
    assert set(samples.values()) == {2}
    assert len(samples) == half.total_samples < NUM_SAMPLES
    assert Stream(spec).num_remaining() == 2 * half.total_samples
    ledger = Stream(spec).ledger()
    for batch in batches[:3]:
        ledger.add(batch["position"], batch["row"])
    rest = joined(Stream(spec, ledger.to_dict()).batches(4))
    assert as_rows(rest) == as_rows(joined(batches[3:]))


def identity(spec, batch, i):
    """A sample by its shard, its chunk's place and its row."""
    chunk = Stream(spec).order.chunks(batch["position"][i : i + 1])[0]
    subset = Stream(spec).manifest
    return int(subset.shard[chunk]), int(subset.offset[chunk]), int(batch["row"][i])


def test_a_row_is_its_sample(manifest, samples, whole):
    """Pixels and tokens by another way: PIL on the whole picture, and draws from the sample's identity."""
    spec = make_spec(manifest)
    chunks = Stream(spec).order.chunks(whole["position"])
    for i in range(0, len(chunks), 5):
        position, row = int(whole["position"][i]), int(whole["row"][i])
        sample = samples[chunk_start(manifest, int(chunks[i])) + row]
        image = Image.open(io.BytesIO(sample["png"]))
        area, aspect, left, upper = (float(uniform(spec.seed, position, row, k)) for k in range(4))
        area = (0.5 + 0.5 * area) * image.width * image.height
        aspect = 0.75 * (16 / 9) ** aspect
        width, height = min(image.width, math.sqrt(area * aspect)), min(image.height, math.sqrt(area / aspect))
        left, upper = left * (image.width - width), upper * (image.height - height)
        box = (left, upper, left + width, upper + height)
        expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC, box=box)).astype(int)
        assert np.abs(whole["image"][i].astype(int) - expected).max() <= 1
        tokens, num_tokens = get_tokenizer(12)(sample["txt"].decode())
        assert whole["tokens"][i].tolist() == tokens[0].tolist()
        assert whole["num_tokens"][i] == num_tokens[0]


def test_a_sample_looks_different_in_every_epoch(manifest, whole):
    chunks = Stream(make_spec(manifest)).order.chunks(whole["position"])
    views = {whole["image"][i].tobytes() for i in np.flatnonzero((chunks == 0) & (whole["row"] == 0))}
    assert len(views) >= 2


# Restarts


@pytest.mark.parametrize("num_done", [0, 1, 5, 20, 33, 34, 65, 70])
def test_a_restart_streams_the_rest_byte_for_byte(manifest, whole, num_done):
    spec = make_spec(manifest)
    ledger = Stream(spec).ledger()
    ledger.add(whole["position"][:num_done], whole["row"][:num_done])
    rest = Stream(spec, ledger.to_dict())
    assert rest.num_remaining() == len(whole["row"]) - num_done
    assert as_rows(joined(rest.batches(7))) == as_rows(whole, slice(num_done, None))


def test_a_restart_fills_the_holes_that_workers_left(manifest, whole):
    done = np.random.default_rng(0).random(len(whole["row"])) < 0.6
    spec = make_spec(manifest)
    ledger = Stream(spec).ledger()
    ledger.add(whole["position"][done], whole["row"][done])
    rest = Stream(spec, ledger.to_dict())
    assert rest.num_remaining() == (~done).sum()
    rows = as_rows(whole)
    assert as_rows(joined(rest.batches(4))) == [rows[i] for i in np.flatnonzero(~done)]


def test_windows_are_read_in_any_order(manifest, whole):
    stream = Stream(make_spec(manifest))
    blocks = {window: stream.read(window) for window in reversed(stream.windows())}
    assert as_rows(joined(blocks[window] for window in stream.windows())) == as_rows(whole)


def test_a_finished_stream_is_empty(manifest, whole):
    spec = make_spec(manifest)
    ledger = Stream(spec).ledger()
    ledger.add(whole["position"], whole["row"])
    assert ledger.to_dict() == {"cursor": spec.end, "partial": {}}
    done = Stream(spec, ledger.to_dict())
    assert done.num_remaining() == 0
    assert list(done.batches(7)) == []


# Counting


@pytest.mark.parametrize("seed", [0, 1])
def test_samples_before_a_position_are_counted_chunk_by_chunk(manifest, seed):
    stream = Stream(make_spec(manifest, seed=seed))
    total = 0
    for position in range(3 * len(manifest)):
        assert stream.samples_before(position) == total
        total += stream.rows_at(position)


@pytest.mark.parametrize("seed", [0, 1])
def test_position_at_is_the_first_with_enough_samples_before(manifest, seed):
    stream = Stream(make_spec(manifest, seed=seed))
    before = [stream.samples_before(position) for position in range(3 * len(manifest) + 1)]
    for wanted in range(2 * NUM_SAMPLES + 5):
        first = next(position for position, count in enumerate(before) if count >= wanted)
        assert Stream.position_at(manifest, seed, wanted) == first


def test_the_data_set_may_not_change_under_a_run(manifest, tmp_path, make_samples, write_dataset):
    with pytest.raises(UserError, match="has changed since the run began"):
        Stream(make_spec(manifest, digest="0" * 64)).read(0)
    other = write_dataset(tmp_path, make_samples(9))
    spec = make_spec(other)
    write_dataset(tmp_path, make_samples(8))
    with pytest.raises(UserError, match=f"'{tmp_path}' has changed"):
        Stream(spec).num_remaining()


# Bad samples


def image(file_format="PNG", size=(40, 40)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, file_format)
    return file.getvalue()


BAD_SAMPLES = {
    "fine": {"png": image(), "txt": b"fine"},
    "no_image": {"txt": b"words only", "svg": b"<svg/>"},
    "image_undecodable": {"png": b"this is no picture", "txt": b"fine"},
    "image_undecodable, cut png": {"png": image()[:1000], "txt": b"fine"},
    "image_undecodable, cut jpg": {"jpg": image("JPEG")[:600], "txt": b"fine"},
    "image_undecodable, cut webp": {"webp": image("WEBP")[:300], "txt": b"fine"},
    "image_too_thin": {"png": image(size=(1, 300)), "txt": b"fine"},
    "image_too_large": {"png": png(10**5, 10**5, 8, 2, b""), "txt": b"fine"},
    "image_undecodable, nothing": {"jpg": b"", "txt": b"fine"},
    "no_caption": {"png": image(), "json": b"{}"},
    "caption_not_utf8": {"png": image(), "txt": b"\xff\xfe caption"},
    "caption_empty": {"png": image(), "txt": b" \n\t "},
}


def write_single(folder, samples, chunk_samples, extra_rows=0):
    """One shard; its manifest claims `extra_rows` more samples in each chunk than there are."""
    with (folder / "0.tar").open("wb") as file:
        spans = write_shard(file, samples, chunk_samples)
    spans = [span._replace(num_samples=span.num_samples + extra_rows) for span in spans]
    manifest = Manifest.from_spans(folder, [("0.tar", (folder / "0.tar").stat().st_size, spans)])
    manifest.save()
    return manifest


def causes_of(manifest):
    batch = joined(Stream(make_spec(manifest, end=len(manifest))).batches(5))
    return batch, [CAUSES[cause] for cause in batch["cause"]]


def assert_marked(batch, causes):
    """Unreadable samples are all zeros but for their identity; the others are there."""
    for i, cause in enumerate(causes):
        readable = cause == "fine"
        assert (
            bool(batch["num_tokens"][i]) == bool(batch["tokens"][i].any()) == bool(batch["image"][i].any()) == readable
        )


def test_bad_samples_are_marked_with_their_cause(tmp_path):
    samples = [{"__key__": f"{i:03}".encode(), **files} for i, files in enumerate(BAD_SAMPLES.values())]
    batch, causes = causes_of(write_single(tmp_path, samples, chunk_samples=4))
    assert_marked(batch, causes)
    chunks = Stream(make_spec(Manifest.load(tmp_path))).order.chunks(batch["position"])
    numbers = chunks * 4 + batch["row"]
    assert [causes[i] for i in np.argsort(numbers)] == [name.partition(",")[0] for name in BAD_SAMPLES]


def test_a_sample_that_the_chunk_lacks_is_marked(tmp_path, make_samples):
    batch, causes = causes_of(write_single(tmp_path, make_samples(6), chunk_samples=3, extra_rows=1))
    assert_marked(batch, causes)
    assert sorted(batch["row"][[cause == "sample_missing" for cause in causes]]) == [3, 3]
    assert causes.count("fine") == 6


def test_every_cause_is_tested():
    tested = {name.partition(",")[0] for name in BAD_SAMPLES} | {
        "chunk_unreadable",
        "sample_missing",
        "image_unreadable",
        "row_malformed",
    }
    assert tested == set(CAUSES) - set(GUARD_CAUSES)


@pytest.mark.parametrize("damage", ["vanished", "cut", "overwritten", "emptied"])
def test_an_unreadable_shard_marks_its_samples(tmp_path, make_samples, write_dataset, damage):
    manifest = write_dataset(tmp_path, make_samples(15), shard_samples=10)
    shard = tmp_path / "000000.tar"
    data = shard.read_bytes()
    if damage == "vanished":
        shard.unlink()
    else:
        shard.write_bytes({"cut": data[:100], "overwritten": b"\xaa" * len(data), "emptied": b""}[damage])
    batch, causes = causes_of(manifest)
    assert_marked(batch, causes)
    assert causes.count("chunk_unreadable") == 10
    assert causes.count("fine") == 5
    ledger = Ledger(lambda position: 5)
    ledger.add(batch["position"], batch["row"])
    assert ledger.cursor == 3


def test_random_damage_to_a_shard_never_raises(tmp_path, make_samples, write_dataset):
    manifest = write_dataset(tmp_path, make_samples(10), chunk_samples=10)
    shard = tmp_path / "000000.tar"
    data = np.frombuffer(shard.read_bytes(), dtype=np.uint8)
    for seed in range(100):
        generator = np.random.default_rng(seed)
        damaged = data.copy()
        # Half of the bytes hit headers, which lie at the start of blocks.
        places = generator.integers(0, len(data), 2 * generator.integers(1, 9))
        places[::2] = places[::2] // 512 * 512 + generator.integers(0, 160, len(places) // 2)
        damaged[places] = generator.integers(0, 256, len(places))
        shard.write_bytes(damaged.tobytes())
        _, causes = causes_of(manifest)
        assert len(causes) == 10
        assert set(causes) <= set(CAUSES)


def test_padding_stands_for_no_sample(manifest):
    padding = Stream(make_spec(manifest)).padding(3)
    assert {name: array.dtype for name, array in padding.items()} == DTYPES
    assert padding["position"].tolist() == [-1] * 3
    assert not padding["num_tokens"].any()
