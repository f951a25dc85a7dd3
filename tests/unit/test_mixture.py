"""Mixtures of data sets: what an epoch holds of each part, beside the formula; restarts; what may not be mixed."""

import itertools
from collections import Counter

import numpy as np
import pytest

from rayclip.data.manifest import Manifest
from rayclip.data.mixture import Mixture, MixturePart, load_parts
from rayclip.data.order import Order
from rayclip.data.stream import Stream, StreamSpec
from rayclip.errors import UserError

SIZES = {"cats": 40, "dogs": 23, "birds": 61}
SEED = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_samples, write_dataset):
    """Three data sets; every caption says which one it is of, and which sample."""
    root, folders = tmp_path_factory.mktemp("parts"), {}
    for name, size in SIZES.items():
        samples = make_samples(size)
        for number, sample in enumerate(samples):
            sample["txt"] = f"{name} {number}".encode()
        folders[name] = str(root / name)
        write_dataset(root / name, samples, shard_samples=15, chunk_samples=4)
    return folders


def make_stream(folders, weights, epochs, seed=SEED, fraction=1.0, ledger=None):
    parts = tuple(MixturePart(folders[name], weight) for name, weight in weights.items())
    whole = load_parts("", parts)
    spec = StreamSpec(
        folder="the mixture", digest=whole.digest, seed=seed, window=3, image_size=8, context_length=12,
        end=epochs * Order(seed, whole.subset(fraction, seed).shares).num_slots,
        crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0), fraction=fraction, mixture=parts,
    )  # fmt: skip
    return Stream(spec, ledger)


def samples_of(stream, batches):
    """(epoch, part, number within the part) of each sample, by what was drawn from its shard."""
    found = []
    for batch in batches:
        for position, row in zip(batch["position"].tolist(), batch["row"].tolist(), strict=True):
            chunk = int(stream.order.chunks(np.array([position]))[0])
            draws = np.zeros(stream.rows_at(position))
            caption = stream.manifest.read_samples(chunk, {}, draws)[row]["txt"].decode()
            part, number = caption.split()
            found.append((position // stream.order.num_slots, part, int(number)))
    return found


@pytest.mark.parametrize("weights", [{"cats": 1}, {"cats": 2, "dogs": 1}, {"dogs": 1, "birds": 3, "cats": 2.0}])
def test_whole_weights_are_the_times_that_an_epoch_has_each_sample(folders, weights):
    stream = make_stream(folders, weights, epochs=2)
    counts = Counter(samples_of(stream, stream.batches(16)))
    expected = {(e, n, i): w for e in range(2) for n, w in weights.items() for i in range(SIZES[n])}
    assert counts == expected
    assert stream.num_remaining() == sum(expected.values())
    assert stream.num_distinct() == sum(SIZES[name] for name in weights)


def test_a_share_of_a_weight_is_a_share_of_the_chunks_anew_in_each_epoch(folders):
    weights, epochs = {"cats": 1.5, "dogs": 0.25, "birds": 1}, 6
    stream = make_stream(folders, weights, epochs)
    counts = Counter(samples_of(stream, stream.batches(16)))
    assert sum(counts.values()) == stream.num_remaining()
    chosen = {}
    for name, weight in weights.items():
        manifest, start = Manifest.load(folders[name]), 0
        rows = [range(start, start := start + n) for n in manifest.num_samples.tolist()]
        assert start == SIZES[name]
        for epoch in range(epochs):
            times = [{counts[epoch, name, i] for i in chunk} for chunk in rows]
            assert all(len(of_chunk) == 1 for of_chunk in times), "chunks are whole"
            more = frozenset(k for k, of_chunk in enumerate(times) if of_chunk == {int(weight) + 1})
            assert all(of_chunk == {int(weight)} for k, of_chunk in enumerate(times) if k not in more)
            assert len(more) == round((weight - int(weight)) * len(rows))
            chosen.setdefault(name, []).append(more)
    assert len(set(chosen["cats"])) > epochs // 2 and len(set(chosen["dogs"])) > 1
    assert stream.num_distinct() == len({(part, number) for _, part, number in counts})


def test_over_many_epochs_each_chunk_is_due_as_often_as_the_weight_says():
    order, epochs = Order(3, ((40, 1.3), (7, 0.5))), 2000
    times = np.bincount(np.concatenate([order.slots(epoch) for epoch in range(epochs)]), minlength=47) / epochs
    assert times[:40] == pytest.approx(1.3, abs=0.05)
    assert times[40:].mean() == pytest.approx(round(0.5 * 7) / 7)


@pytest.mark.parametrize("weights", [{"cats": 2, "dogs": 1}, {"cats": 0.5, "birds": 1.7}])
def test_what_comes_after_an_interruption_is_what_would_have_come(folders, weights):
    whole = list(make_stream(folders, weights, epochs=3).batches(10))
    for num_batches in (1, 5, 9):
        ledger = make_stream(folders, weights, epochs=3).ledger()
        for batch in whole[:num_batches]:
            ledger.add(batch["position"], batch["row"])
        rest = make_stream(folders, weights, epochs=3, ledger=ledger.to_dict())
        assert rest.num_remaining() == sum(len(batch["row"]) for batch in whole[num_batches:])
        for batch, expected in zip(rest.batches(10), whole[num_batches:], strict=True):
            assert all(np.array_equal(batch[key], expected[key]) for key in expected)


@pytest.mark.parametrize("weights", [{"cats": 2, "dogs": 1}, {"cats": 0.5, "birds": 1.7}])
def test_samples_are_counted_position_by_position(folders, weights):
    stream = make_stream(folders, weights, epochs=3)
    before = [0, *itertools.accumulate(stream.rows_at(position) for position in range(stream.spec.end))]
    assert [stream.samples_before(position) for position in range(stream.spec.end + 1)] == before
    for samples in range(0, before[-1], 7):
        first = next(position for position, count in enumerate(before) if count >= samples)
        assert Stream.position_at(stream.manifest, SEED, samples) == first


def test_a_share_of_a_mixture_is_that_share_of_each_part(folders):
    stream = make_stream(folders, {"cats": 1, "birds": 2}, epochs=1, fraction=0.5)
    parts = [len(Manifest.load(folders[name])) for name in ("cats", "birds")]
    assert [num_chunks for num_chunks, _ in stream.manifest.shares] == [round(n / 2) for n in parts]


def test_a_mixture_of_one_is_in_the_order_of_that_data_set(folders):
    manifest = Manifest.load(folders["birds"])
    positions = np.arange(3 * len(manifest))
    alone, mixed = Order(SEED, len(manifest)), Order(SEED, Mixture((manifest,), (1.0,)).shares)
    assert np.array_equal(alone.chunks(positions), mixed.chunks(positions))


def test_the_digest_is_of_the_parts_and_their_weights(folders):
    def digest(*parts):
        return Mixture.load([MixturePart(folders[name], weight) for name, weight in parts]).digest

    digests = [
        digest(("cats", 1), ("dogs", 1)),
        digest(("cats", 1.0), ("dogs", 2)),
        digest(("dogs", 1), ("cats", 1)),
        digest(("cats", 1), ("birds", 1)),
        Manifest.load(folders["cats"]).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert digest(("cats", 1.0), ("dogs", 1.0)) == digests[0]


def test_what_is_missing_or_there_twice_is_one_line(folders, tmp_path):
    with pytest.raises(UserError, match=f"no data set at '{tmp_path}/none'"):
        Mixture.load([MixturePart(folders["cats"], 1), MixturePart(f"{tmp_path}/none", 1)])
    with pytest.raises(UserError, match=f"'{folders['cats']}' is twice in data.mixture"):
        Mixture.load(
            [MixturePart(folders["cats"], 1), MixturePart(folders["dogs"], 1), MixturePart(folders["cats"], 2)]
        )


def test_a_chunk_is_named_with_the_folder_of_its_part(folders):
    mixture = Mixture.load([MixturePart(folders["cats"], 1), MixturePart(folders["dogs"], 1)])
    first = len(Manifest.load(folders["cats"]))
    assert mixture.place(first - 1)[0] == f"{folders['cats']}/000002.tar"
    assert mixture.place(first) == (f"{folders['dogs']}/000000.tar", 0)
    assert [(part["path"], part["weight"], part["samples"]) for part in mixture.parts()] == [
        (folders["cats"], 1, 40),
        (folders["dogs"], 1, 23),
    ]
