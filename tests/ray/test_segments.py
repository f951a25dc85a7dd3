"""The stream as a chain of legs through Ray Data, beside the same stream in one plain process."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import pytest
import ray

from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.errors import UserError
from rayclip.orchestration.train.segments import SegmentCoordinator, WorkerStream
from rayclip.orchestration.train.stream import remaining_stream

BATCH = 7
LEG = 3


@pytest.fixture(scope="module")
def spec(tmp_path_factory, make_samples, write_dataset):
    """An epoch and a part of the next: five windows, of which legs of three leave a rest."""
    folder = tmp_path_factory.mktemp("data")
    manifest = write_dataset(folder, make_samples(55), chunk_samples=5)
    return StreamSpec(
        folder=str(folder), digest=manifest.digest, seed=5, end=len(manifest) + 3, window=3, image_size=16,
        context_length=12, crop_scale=(0.5, 1.0), crop_ratio=(3 / 4, 4 / 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(spec):
    return list(Stream(spec).batches(BATCH))


def shares(stream, num_workers, segment_windows):
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    coordinator = SegmentCoordinator.remote(segment_windows, context)
    group = coordinator.begin.remote(lambda: stream, num_workers)
    return [WorkerStream(coordinator, group, rank) for rank in range(num_workers)]


def consume(stream, num_workers, segment_windows=LEG):
    """What each worker gets."""
    with ThreadPoolExecutor(num_workers) as workers:
        return list(workers.map(lambda share: list(share.batches(BATCH)), shares(stream, num_workers, segment_windows)))


def identities(batches):
    return [pair for b in batches for pair in zip(b["position"].tolist(), b["row"].tolist(), strict=True)]


def half_done(spec, whole):
    """A restart: the first 10 samples are done, and of the rest a fifth."""
    samples = np.array(identities(whole))
    done = np.random.default_rng(0).random(len(samples)) < 0.2
    done[:10] = True
    ledger = Stream(spec).ledger()
    ledger.add(*samples[done].T)
    return Stream(spec, ledger.to_dict())


def test_one_worker_gets_the_batches_of_one_process_whatever_a_leg_is_long(spec, whole):
    (batches,) = consume(Stream(spec), 1)
    assert len(batches) == len(whole)
    for ours, expected in zip(batches, whole, strict=True):
        for name in expected:
            assert np.array_equal(ours[name], expected[name]), name
    deadline = time.monotonic() + 60
    while processes("SplitCoordinator") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes("SplitCoordinator"), "a leg that is over leaves nothing behind"


def processes(actor):
    """Those of an actor's class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may have ended meanwhile
            found += [process] if f"ray::{actor}" in " ".join(process.cmdline()) else []
    return found


def test_two_workers_go_on_from_a_ledger_with_holes_and_get_each_sample_once(spec, whole):
    stream = half_done(spec, whole)
    parts = consume(stream, 2)
    assert len({tuple(len(batch["row"]) for batch in part) for part in parts}) == 1, "batches of one size on both"
    assert all(len(batch["row"]) == BATCH for part in parts for batch in part[:-1])
    given = [pair for part in parts for pair in identities(part) if pair[0] >= 0]
    assert sorted(given) == sorted(identities(stream.batches(BATCH)))
    assert len(given) == stream.num_remaining() > 6 * BATCH


def test_a_run_that_has_ended_gets_nothing(spec, whole):
    ledger = Stream(spec).ledger()
    ledger.add(*np.array(identities(whole)).T)
    assert consume(Stream(spec, ledger.to_dict()), 2) == [[], []]


def test_workers_of_a_group_that_is_over_get_nothing_of_the_next(spec, whole):
    (former,) = shares(Stream(spec), 1, LEG)
    share = replace(former, group=former.coordinator.begin.remote(lambda: Stream(spec), 1))
    with pytest.raises(RuntimeError, match="shared out to other workers"):
        next(former.batches(BATCH))
    assert identities(share.batches(BATCH)) == identities(whole)


def test_a_coordinator_that_was_killed_is_there_for_the_next_group(spec, whole):
    others = processes("SegmentCoordinator")
    (former,) = shares(Stream(spec), 1, LEG)
    ray.get(former.group)
    (coordinator,) = set(processes("SegmentCoordinator")) - set(others)
    coordinator.kill()
    coordinator.wait(10)
    # As in a run: whoever begins a group has not asked this coordinator before.
    begin = ray.remote(num_cpus=0)(lambda coordinator: ray.get(coordinator.begin.remote(lambda: Stream(spec), 1)))
    share = replace(former, group=begin.remote(former.coordinator))
    assert identities(share.batches(BATCH)) == identities(whole)
    with pytest.raises(RuntimeError, match="shared out to other workers"):
        next(former.batches(BATCH))


def test_every_worker_hears_that_a_checkpoint_is_damaged(spec, tmp_path):
    context = ray.data.DataContext.get_current().copy()
    coordinator = SegmentCoordinator.remote(LEG, context)
    group = coordinator.begin.remote(partial(remaining_stream, spec, str(tmp_path), tmp_path), 2)
    for rank in range(2):
        with pytest.raises(UserError, match="is not a checkpoint"):
            next(WorkerStream(coordinator, group, rank).batches(BATCH))


def test_every_worker_hears_what_is_wrong_with_the_data(spec, tmp_path, make_samples, write_dataset):
    changed = Stream(StreamSpec(**{**vars(spec), "digest": "0" * 64}))
    for share in shares(changed, 2, LEG):
        with pytest.raises(UserError, match="has changed since the run began"):
            next(share.batches(BATCH))
    assert Manifest.load(spec.folder).digest == spec.digest
