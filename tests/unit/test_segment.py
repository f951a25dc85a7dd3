"""Legs beside the whole stream that they are cut from: the same samples, from a part of the manifest."""

import pickle

import numpy as np
import pytest

from rayclip.data import order
from rayclip.data import stream as data_stream
from rayclip.data.manifest import Manifest
from rayclip.data.mixture import MixturePart, load_parts
from rayclip.data.order import Order
from rayclip.data.segment import StreamSegment
from rayclip.data.stream import Stream, StreamSpec, cut

WINDOW = 3


def make_spec(digest, shares, folder="", mixture=(), end=None):
    return StreamSpec(
        folder=folder, digest=digest, seed=5, end=end or 2 * Order(5, shares).num_slots + 1, window=WINDOW,
        image_size=8, context_length=12, crop_scale=(0.5, 1.0), crop_ratio=(3 / 4, 4 / 3), mixture=mixture,
    )  # fmt: skip


@pytest.fixture(scope="module")
def specs(tmp_path_factory, make_samples, write_dataset):
    """Of a data set, and of a mixture with another one."""
    root = tmp_path_factory.mktemp("legs")
    first = write_dataset(root / "first", make_samples(47), shard_samples=15, chunk_samples=4)
    write_dataset(root / "second", make_samples(21, seed=1), shard_samples=10, chunk_samples=4)
    parts = (MixturePart(str(root / "first"), 1.0), MixturePart(str(root / "second"), 1.5))
    mixture = load_parts("", parts)
    return {
        "data set": make_spec(first.digest, first.shares, first.folder),
        "mixture": make_spec(mixture.digest, mixture.shares, "both", parts),
    }


def segments_of(stream, size):
    windows = stream.windows()
    return [StreamSegment(stream, windows[at : at + size]) for at in range(0, len(windows), size)]


@pytest.mark.parametrize("kind", ["data set", "mixture"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_legs_read_what_the_stream_does(specs, kind, size):
    """Also after a restart with holes; and each leg travels by itself, to where nobody has read the manifest."""
    stream = Stream(specs[kind])
    samples = np.concatenate([np.stack([b["position"], b["row"]], 1) for b in stream.batches(10)])
    ledger = stream.ledger()
    done = np.random.default_rng(0).random(len(samples)) < 0.5
    done[:25] = True
    ledger.add(*samples[done].T)
    rest = Stream(specs[kind], ledger.to_dict())
    segments = pickle.loads(pickle.dumps(segments_of(rest, size)))
    assert sum(segment.num_remaining() for segment in segments) == rest.num_remaining() == (~done).sum()
    assert [window for segment in segments for window in segment.windows()] == list(rest.windows())
    for segment in segments:
        blocks = [segment.read(window) for window in segment.windows()]
        assert sum(len(block["row"]) for block in blocks) == segment.num_remaining()
        for window, block in zip(segment.windows(), blocks, strict=True):
            expected = rest.read(window)
            assert all(np.array_equal(block[name], expected[name]) for name in expected)
            for position in set(block["position"].tolist()):
                assert segment.place_at(position) == rest.place_at(position)


def test_a_leg_is_as_large_as_its_windows_however_large_the_manifest_is(tmp_path):
    sizes = []
    for num_chunks in (1_000, 100_000):
        shard = np.arange(num_chunks, dtype=np.int32) // 10
        names, ones = tuple(f"{i:06}.tar" for i in range(num_chunks // 10)), np.ones(num_chunks, dtype=np.int64)
        sizes_of = tuple(range(num_chunks // 10))
        manifest = Manifest(str(tmp_path), names, sizes_of, shard, ones, ones, ones.astype(np.int32))
        manifest.save()
        stream = Stream(make_spec(manifest.digest, manifest.shares, str(tmp_path)))
        sizes.append(len(pickle.dumps(StreamSegment(stream, range(5, 105)))))
    assert sizes[1] < 2 * sizes[0], "more shards of its own, but none of the hundredfold others"


@pytest.mark.parametrize("kind", ["data set", "mixture"])
def test_what_is_computed_in_blocks_is_what_it_is_at_once(specs, kind, monkeypatch):
    def computed():
        stream = Stream(specs[kind])
        num_slots = stream.order.num_slots
        permuted = [stream.order.chunks(np.arange(e * num_slots, (e + 1) * num_slots)).tolist() for e in range(3)]
        before = [stream.samples_before(position) for position in range(2 * num_slots)]
        reached = [Stream.position_at(stream.manifest, 5, wanted) for wanted in range(0, before[-1], 3)]
        return permuted, before, reached, stream.num_distinct(), stream.num_remaining()

    at_once = computed()
    monkeypatch.setattr(order, "_BLOCK", 4)
    data_stream._order.cache_clear()
    assert computed() == at_once


@pytest.mark.parametrize("sizes", [[5, 5, 5], [1, 0, 13, 2], [3, 3, 4, 4], [0], []])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_batches_are_full_but_the_last_and_keep_the_order(sizes, batch_size):
    numbers = iter(range(sum(sizes)))
    parts = [{"row": np.array([next(numbers) for _ in range(size)], dtype=np.int32)} for size in sizes]
    batches = [batch["row"].tolist() for batch in cut(parts, batch_size)]
    rows = list(range(sum(sizes)))
    assert batches == [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
