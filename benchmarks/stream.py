"""What a longer manifest costs a run's processes: the stream through Ray into a train worker, at 1, 10 and 100 times.

The same work at each size: the first windows of the stream, over a seam between two legs. A data set is one small shard
under many names. Memory is what a process has for itself (resident, less what is shared), the most that was seen of
any process of a kind while the run was there; the driver and the worker hold what those of a training run hold.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from benchmarks.config import BenchmarkConfig
from benchmarks.workload import pngs
from rayclip.data.formats.tar import write_shard
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.orchestration.cluster.connection import connect
from rayclip.orchestration.train.stream import StreamConfig

_TIMES = (1, 10, 100)
_CHUNK, _CHUNKS_A_SHARD, _WINDOW = 4, 160, 8
_SEGMENT_WINDOWS, _WINDOWS = 512, 640
"""Of a leg, and of those that are streamed."""
_SIDE, _BATCH = 16, 64
_EVERY_S = 0.2
_KINDS = {
    "planner": "ray::Planner",
    "coordinator": "ray::SplitCoordinator",
    "reader": "ray::ReadRange",
    "worker": "ray::RayTrainWorker",
}


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Megabytes of each kind of process and seconds to the first batch at each size; bytes a chunk from the ends."""
    connect(local_cpus=3)
    report: dict[str, Any] = {"leg_windows": _SEGMENT_WINDOWS, "windows": _WINDOWS}
    sizes = [times * config.chunks for times in _TIMES]
    peaks = []
    for chunks in sizes:
        with tempfile.TemporaryDirectory() as folder:
            figures, peak = _streamed(Path(folder), chunks)
        peaks.append(peak)
        report |= {f"{key}_{chunks}_chunks": value for key, value in figures.items()}
    grown = sizes[-1] - sizes[0]
    return report | {f"{kind}_bytes_a_chunk": round((peaks[-1][kind] - peaks[0][kind]) / grown, 1) for kind in peaks[0]}


def _streamed(folder: Path, chunks: int) -> tuple[dict[str, float], dict[str, int]]:
    """(what is told, peak of each kind of process in bytes)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # whose memory is none of the driver's
        spec, in_memory = pool.apply(_write, (folder / "data", chunks))
    file = folder / "batches.npy"
    with _peaks() as peak:
        Stream(spec).num_remaining()
        started = time.time()
        data = StreamConfig(spec, str(folder / "stream"), segment_windows=_SEGMENT_WINDOWS)
        TorchTrainer(
            _consume,
            train_loop_config={"told": str(file), "spec": spec},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="stream", storage_path=str(folder)),
            datasets={"train": ray.data.range(1)},  # stands for the stream
            dataset_config=data,
        ).fit()
    times, waits = np.load(file), np.diff(np.load(file))
    figures = {
        "manifest_mb": in_memory / 1e6,
        "first_batch_s": times[1] - times[0],
        "run_s": time.time() - started,
        "longest_wait_s": waits[1:].max(),
        **{f"{kind}_mb": size / 1e6 for kind, size in peak.items()},
    }
    return {key: round(float(value), 1) for key, value in figures.items()}, peak


def _write(folder: Path, chunks: int) -> tuple[StreamSpec, int]:
    """The data set's stream, and the bytes of its manifest's arrays."""
    folder.mkdir()
    samples = [
        {"__key__": f"{i:06}".encode(), "png": image, "txt": f"picture {i}".encode()}
        for i, image in enumerate(pngs(_SIDE)[: 16 * _CHUNK])
    ]
    with (folder / "000000.tar").open("wb") as target:
        spans = write_shard(target, samples, _CHUNK)
    names = [f"{i:06}.tar" for i in range(-(-chunks // _CHUNKS_A_SHARD))]
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    numbers = np.arange(chunks)
    offset, length, num_samples = np.array(spans, dtype=np.int64)[numbers % len(spans)].T
    manifest = Manifest(
        str(folder), tuple(names), ((folder / names[0]).stat().st_size,) * len(names),
        (numbers // _CHUNKS_A_SHARD).astype(np.int32), offset.copy(), length.copy(), num_samples.astype(np.int32),
    )  # fmt: skip
    manifest.save()
    spec = StreamSpec(
        folder=str(folder), digest=manifest.digest, seed=0, end=2 * chunks, window=_WINDOW, image_size=_SIDE,
        context_length=16, crop_scale=(0.9, 1.0), crop_ratio=(3 / 4, 4 / 3),
    )  # fmt: skip
    arrays = (manifest.shard, manifest.offset, manifest.length, manifest.num_samples)
    return replace(spec, end=min(spec.end, _WINDOWS * _WINDOW)), sum(array.nbytes for array in arrays)


def _consume(config: dict[str, Any]) -> None:
    """Take the stream as a worker does that trains, and note when each batch came."""
    times = [time.time()]
    ledger = Stream(config["spec"]).ledger()
    for batch in ray.train.get_dataset_shard("train").batches(_BATCH):
        ledger.add(batch["position"], batch["row"])
        times.append(time.time())
    np.save(config["told"], times)


@contextmanager
def _peaks() -> Iterator[dict[str, int]]:
    """The most memory of each kind of process while the context is open; filled in when it closes."""
    peak: dict[str, int] = defaultdict(int)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY_S):
            for kind, size in _held():
                peak[kind] = max(peak[kind], size)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def _held() -> Iterator[tuple[str, int]]:
    """(kind, bytes that no other process shares) of this process and those that Ray has started for it."""
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.Error):  # it may have ended meanwhile
            title = " ".join(process.cmdline())
            kind = "driver" if process == here else next((k for k, t in _KINDS.items() if title.startswith(t)), None)
            if kind:
                memory = process.memory_info()
                yield kind, memory.rss - memory.shared
