"""The ledger: every sample of every epoch exactly once, whatever crashes and resizes happen."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayclip.data.decode import CAUSES
from rayclip.data.formats.tar import write_shard
from rayclip.data.ledger import Ledger
from rayclip.data.manifest import Manifest
from rayclip.data.order import Order
from rayclip.data.stream import Stream, StreamSpec


def remaining_samples(order, ledger, end):
    """What the ledger lacks, in the stream's order, as (position, row)."""
    for window in range(ledger.cursor // order.window, -(-end // order.window)):
        left = [
            (position, row)
            for position in order.positions(window, end).tolist()
            for row in ledger.remaining_rows(position).tolist()
        ]
        samples = np.array(left, dtype=np.int64).reshape(-1, 2)
        yield from (tuple(sample) for sample in samples[order.mix_rows(samples[:, 0], samples[:, 1])].tolist())


def share_out(samples, num_workers, batch_size):
    """Blocks of `batch_size` samples go to the workers in turn, and each worker takes one a step."""
    shares = [[] for _ in range(num_workers)]
    for start in range(0, len(samples), batch_size):
        shares[start // batch_size % num_workers].append(samples[start : start + batch_size])
    return [[share[step] for share in shares if step < len(share)] for step in range(max(map(len, shares), default=0))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_sample_is_trained_on_exactly_once_across_crashes_and_resizes(data):
    chunk_sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    window = data.draw(st.integers(1, 5))
    end = data.draw(st.integers(1, 3 * len(chunk_sizes)))
    order = Order(data.draw(st.integers(0, 99)), len(chunk_sizes), window)

    def rows_at(position):
        return chunk_sizes[order.chunks(np.array([position]))[0]]

    saved, saved_lineage = json.dumps(Ledger(rows_at).to_dict()), []
    for _ in range(50):
        # A start: on some number of workers, from the last checkpoint.
        ledger, lineage = Ledger.from_dict(json.loads(saved), rows_at), list(saved_lineage)
        num_workers, batch_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
        steps = share_out(list(remaining_samples(order, ledger, end)), num_workers, batch_size)
        crash_after = data.draw(st.integers(0, 12))
        unsaved = []
        for step, batches in enumerate(steps):
            if step == crash_after:
                break
            # Workers are not in step with what each of them was given: any order of theirs will do.
            for batch in data.draw(st.permutations(batches)):
                unsaved += batch
            if data.draw(st.booleans()):
                taken = np.array(unsaved, dtype=np.int64)
                ledger.add(taken[:, 0], taken[:, 1])
                lineage, unsaved = lineage + unsaved, []
                saved, saved_lineage = json.dumps(ledger.to_dict()), list(lineage)
        else:
            lineage += unsaved
            break
    else:
        lineage += list(remaining_samples(order, ledger, end))
    expected = {(position, row): 1 for position in range(end) for row in range(rows_at(position))}
    assert Counter(lineage) == expected


@pytest.fixture(scope="module")
def mixed_chunks(tmp_path_factory, make_samples):
    """A data set whose chunks have one to seven samples, and one of them more samples than there are."""
    folder, shards, samples = tmp_path_factory.mktemp("mixed"), [], make_samples(40)
    for number, (count, size) in enumerate([(7, 3), (5, 1), (14, 7), (8, 4), (6, 5)]):
        with (folder / f"{number}.tar").open("wb") as file:
            spans = write_shard(file, samples[:count], size)
        if number == 3:
            spans[0] = spans[0]._replace(num_samples=6)
        shards.append((f"{number}.tar", (folder / f"{number}.tar").stat().st_size, spans))
    Manifest.from_spans(folder, shards).save()
    return Manifest.load(folder)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_stream_itself_gives_every_sample_once_across_crashes_and_resizes(mixed_chunks, data):
    """As above, with files that are read, samples that cannot be, and the padding that shares the rest out evenly."""
    end = data.draw(st.integers(1, 3 * len(mixed_chunks)))
    spec = StreamSpec(
        folder=mixed_chunks.folder, digest=mixed_chunks.digest, seed=data.draw(st.integers(0, 99)), end=end,
        window=data.draw(st.integers(1, 5)), image_size=8, context_length=8, crop_scale=(0.9, 1.0), crop_ratio=(1, 1),
    )  # fmt: skip
    saved, lineage = None, []
    counts = mixed_chunks.num_samples[Stream(spec).order.chunks(np.arange(end))].tolist()
    left = total = sum(counts)
    for crash_after in [*data.draw(st.lists(st.integers(0, 8), max_size=4)), None]:
        num_workers, batch_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
        stream = Stream(spec, saved and json.loads(saved))
        assert stream.num_remaining() == left
        blocks = [*map(stream.read, stream.windows()), stream.padding(-left % num_workers)]
        rows = np.concatenate([np.stack([b["position"], b["row"], b["cause"]], axis=1) for b in blocks])
        assert len(rows) % num_workers == 0
        ledger = stream.ledger()
        for batches in share_out(rows.tolist(), num_workers, batch_size)[:crash_after]:
            real = [row for batch in batches for row in batch if row[0] >= 0]
            ledger.add(*np.array(real, dtype=np.int64).reshape(-1, 3)[:, :2].T)
            lineage += real
        saved, left = json.dumps(ledger.to_dict()), total - len(lineage)
    assert Counter((p, r) for p, r, _ in lineage) == {(p, r): 1 for p, count in enumerate(counts) for r in range(count)}
    missing = [row for _, row, cause in lineage if CAUSES[cause] == "sample_missing"]
    assert sorted(missing) == sorted(row for count in counts if count == 6 for row in (4, 5))
    assert Stream(spec, json.loads(saved)).ledger().to_dict() == {"cursor": end, "partial": {}}


def four_rows(position):
    return 4


def test_the_cursor_passes_positions_once_they_are_whole():
    ledger = Ledger(four_rows)
    ledger.add(np.array([1, 1, 1, 1, 0, 0, 2]), np.array([0, 1, 2, 3, 3, 1, 0]))
    assert ledger.cursor == 0
    assert ledger.num_done_beyond_cursor() == 7
    assert ledger.remaining_rows(0).tolist() == [0, 2]
    assert ledger.remaining_rows(1).tolist() == []
    ledger.add(np.array([0, 0]), np.array([0, 2]))
    assert ledger.cursor == 2
    assert ledger.num_done_beyond_cursor() == 1
    assert ledger.remaining_rows(1).tolist() == []
    assert ledger.remaining_rows(2).tolist() == [1, 2, 3]
    assert ledger.remaining_rows(9).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_sample_that_comes_twice_is_refused(position):
    ledger = Ledger(four_rows)
    ledger.add(np.array([0, 0, 0, 0, 1, 2]), np.array([0, 1, 2, 3, 3, 3]))
    with pytest.raises(ValueError, match=rf"\(position {position}, row 3\) was trained on twice"):
        ledger.add(np.array([position]), np.array([3]))


def test_a_sample_that_comes_twice_in_one_call_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Ledger(four_rows).add(np.array([0, 5, 0]), np.array([2, 2, 2]))


def test_json_keeps_a_ledger():
    ledger = Ledger(lambda position: 64 + position)  # more rows than a machine word has bits
    positions = np.repeat(np.arange(4), [64, 65, 50, 3])
    rows = np.concatenate([np.arange(64), np.arange(1, 66) % 65, np.arange(50) + 13, [66, 0, 64]])
    ledger.add(positions, rows)
    text = json.dumps(ledger.to_dict())
    again = Ledger.from_dict(json.loads(text), lambda position: 64 + position)
    assert json.dumps(again.to_dict()) == text
    assert again.cursor == ledger.cursor == 2
    assert again.num_done_beyond_cursor() == 53
    for position in range(5):
        assert again.remaining_rows(position).tolist() == ledger.remaining_rows(position).tolist()
    assert again.remaining_rows(3).tolist() == sorted(set(range(67)) - {66, 0, 64})


def test_a_new_ledger_is_what_a_run_begins_with():
    assert Ledger(four_rows).to_dict() == {"cursor": 0, "partial": {}}
