"""The order of the stream against arithmetic on Python's own integers, and against numbers that must never change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayclip.data.order import Order, epoch_order, mix64, uniform

WORD = (1 << 64) - 1


def reference_mix(seed, *values):
    """SplitMix64's finaliser, once a value."""

    def scramble(state):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & WORD
        return state ^ (state >> 31)

    state = scramble(seed & WORD)
    for value in values:
        state = scramble(state ^ (value & WORD))
    return state


@given(st.integers(0, 1 << 70), st.lists(st.integers(-(1 << 62), (1 << 63) - 1), max_size=4))
def test_mix64_is_splitmix64(seed, values):
    assert int(mix64(seed, *values)) == reference_mix(seed, *values)


def test_mix64_of_one_number_is_the_published_sequence():
    # The first output of SplitMix64 seeded with 0 and with 1234567 (Vigna's splitmix64.c).
    assert int(mix64(0)) == 0xE220A8397B1DCDAF
    assert int(mix64(1234567)) == 6457827717110365317


def test_mix64_broadcasts():
    mixed = mix64(3, np.arange(2)[:, None], np.arange(5))
    assert mixed.shape == (2, 5)
    assert int(mixed[1, 4]) == reference_mix(3, 1, 4)


def test_uniform_takes_the_53_highest_bits():
    values = uniform(5, np.arange(4000))
    assert [float(v) for v in values[:50]] == [(reference_mix(5, i) >> 11) / 2**53 for i in range(50)]
    assert 0 <= values.min() < 0.01 and 0.99 < values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [
        (0, 0, [0, 11, 9, 1, 6, 3, 5, 4, 10, 2, 8, 7]),
        (0, 1, [8, 3, 0, 1, 10, 5, 2, 7, 11, 4, 9, 6]),
        (7, 3, [2, 9, 1, 7, 6, 3, 8, 11, 4, 0, 10, 5]),
    ],
)
def test_the_order_never_changes(seed, epoch, expected):
    assert epoch_order(seed, epoch, 12).tolist() == expected


@pytest.mark.parametrize("num_chunks", [1, 2, 37, 1000])
def test_an_epoch_is_the_ranks_of_the_mixed_chunk_numbers(num_chunks):
    ranked = sorted(range(num_chunks), key=lambda chunk: reference_mix(11, 4, chunk))
    assert epoch_order(11, 4, num_chunks).tolist() == ranked


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_chunks_run_across_the_borders_of_epochs():
    order = Order(seed=2, num_chunks=7)
    whole = [chunk for epoch in range(5) for chunk in epoch_order(2, epoch, 7).tolist()]
    assert order.chunks(np.arange(35)).tolist() == whole
    assert order.chunks(np.array([34, 0, 13, 6, 7, 13])).tolist() == [whole[p] for p in (34, 0, 13, 6, 7, 13)]


def test_windows_cover_all_positions_up_to_the_end():
    order = Order(seed=0, num_chunks=7, window=4)
    windows = [order.positions(window, end=18).tolist() for window in range(5)]
    assert windows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17]]
    assert order.positions(5, end=18).tolist() == []


@given(st.data())
def test_what_is_left_of_a_window_comes_in_the_order_it_had(data):
    samples = data.draw(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 63)), unique=True, max_size=60))
    kept = [sample for sample in samples if data.draw(st.booleans())]
    order = Order(seed=3, num_chunks=9, window=4)

    def mixed(subset):
        rows = np.array(subset, dtype=np.int64).reshape(-1, 2)
        return [subset[i] for i in order.mix_rows(rows[:, 0], rows[:, 1])]

    assert mixed(kept) == [sample for sample in mixed(samples) if sample in set(kept)]


def test_a_window_emits_samples_by_the_mix_of_their_identity():
    samples = [(position, row) for position in range(20, 25) for row in range(30)]
    positions, rows = np.array(samples).T
    mixed = Order(seed=6, num_chunks=9, window=5).mix_rows(positions, rows)
    assert [samples[i] for i in mixed] == sorted(samples, key=lambda sample: reference_mix(6, *sample))


def test_rows_of_a_window_are_mixed_among_its_positions():
    positions, rows = np.repeat(np.arange(8), 64), np.tile(np.arange(64), 8)
    mixed = Order(seed=0, num_chunks=9, window=8).mix_rows(positions, rows)
    assert sorted(mixed.tolist()) == list(range(512))
    assert len(set(positions[mixed[:64]].tolist())) == 8
    again = Order(seed=1, num_chunks=9, window=8).mix_rows(positions, rows)
    assert not np.array_equal(mixed, again)
