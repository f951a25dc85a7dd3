"""What a stream through Ray holds before its first batch, at manifests of very different sizes."""

import itertools
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import ray

from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.orchestration.stream import remaining_dataset

pytestmark = pytest.mark.slow

WINDOW = 8
MANY, MORE = 10_000, 1_000_000
MANIFEST_BYTES = 24
"""A chunk's shard, offset, length and number of samples."""


@pytest.fixture(scope="module")
def write_large(tmp_path_factory, make_samples, write_dataset):
    """Writes a data set whose manifest lists the one chunk of its one small shard as often as wanted."""

    def write(num_chunks):
        folder = tmp_path_factory.mktemp("large")
        small = write_dataset(folder, make_samples(1), chunk_samples=1)
        span = (0, int(small.length[0]), 1)
        manifest = Manifest.from_spans(folder, [(small.shards[0], small.shard_bytes[0], np.array([span] * num_chunks))])
        manifest.save()
        return StreamSpec(
            folder=str(folder), digest=manifest.digest, seed=1, end=num_chunks, window=WINDOW, image_size=8,
            context_length=8, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0),
        )  # fmt: skip

    return write


def test_what_is_held_before_the_first_batch_grows_with_the_manifest_alone(tmp_path, write_large):
    held = {}
    for num_chunks in (MANY, MORE):
        spec = write_large(num_chunks)
        before, started = psutil.Process().memory_full_info().uss, time.monotonic()
        dataset = remaining_dataset(spec, str(tmp_path / "none"), 1)
        dataset.context.execution_options.preserve_order = True
        (shard,) = dataset.streaming_split(1, equal=True)
        batches = list(itertools.islice(shard.iter_batches(batch_size=16, prefetch_batches=1), 20))
        positions = np.concatenate([batch["position"] for batch in batches])
        expected = [Stream(spec).read(window)["position"] for window in range(len(positions) // WINDOW)]
        assert np.array_equal(positions, np.concatenate(expected))
        held[num_chunks] = driver, stream = psutil.Process().memory_full_info().uss - before, bytes_of_coordinator()
        told = f"driver +{driver / 2**20:.1f} MiB, stream {stream / 2**20:.1f} MiB"
        print(f"{num_chunks:>9,} chunks: {told}, {time.monotonic() - started:.1f} s")
        ray.kill(shard._coord_actor)
        del shard, dataset
    driver, stream = ((held[MORE][i] - held[MANY][i]) / (MORE - MANY) for i in range(2))
    assert driver < 3 * MANIFEST_BYTES  # the manifest, and the order of an epoch
    assert stream < MANIFEST_BYTES


def bytes_of_coordinator():
    """Memory of the process that Ray Data executes the stream in."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # processes come and go
            if "SplitCoordinator" in " ".join(process.cmdline()):
                found.append(process.memory_full_info().uss)
    return max(found)
