"""Pictures a second from JPEGs in tar shards to batches: one core, from S3, and through Ray into a train worker.

On one core, in turn and pinned to the same core: the stream of a training run; open_clip's own webdataset pipeline with
its transforms and tokenizer, in the process itself (workers=0: on one core a worker process would only add copies); and
the bare loop, which has every file in memory and does nothing but decode, crop and resize. S3 is moto's server, a
process of its own on another core. Rates of one core are by processor time too: they hold while others use the machine.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from benchmarks.config import BenchmarkConfig
from benchmarks.loader_data import CHUNK, IMAGE_SIZE, RATIO, SCALE, WINDOW, Data, s3_server
from benchmarks.peers import load_open_clip, load_open_clip_data
from rayclip.data.decode import crop_image, random_box
from rayclip.data.stream import Batch, Stream
from rayclip.orchestration.cluster.connection import connect
from rayclip.orchestration.train.stream import StreamConfig

_SIDES = (600, 256)
_BATCH = 128
_EPOCHS, _WINDOWS = 2, 4
"""Length of the longer stream that goes through Ray, and in which the pause at an epoch's end is looked for."""
_S3_SHARE = 0.5
_SETTLED = 0.25
"""Share of the samples after which the rate through Ray is measured: workers have started, buffers are full."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Rates and ratios, those of 600 px without a suffix. Raises UserError without open_clip."""
    cases = config.cases or ("core", "s3", "ray")
    load_open_clip()
    report: dict[str, Any] = {"pictures": config.images, "image_size": IMAGE_SIZE}
    for side in _SIDES:
        with tempfile.TemporaryDirectory() as folder:
            figures = _figures(Path(folder), side, cases, config)
        suffix = "" if side == _SIDES[0] else f"_{side}px"
        report |= {key + suffix: value for key, value in figures.items()}
    return report


def _figures(folder: Path, side: int, cases: Sequence[str], config: BenchmarkConfig) -> dict[str, Any]:
    data = Data(folder / "data", side, config.images)
    longer = Data(folder / "longer", side, _WINDOWS * WINDOW * CHUNK)
    figures: dict[str, Any] = {"jpeg_kb": round(statistics.mean(map(len, data.files)) / 1000, 1)}
    if "core" in cases:
        figures |= _one_core(data, config.repeats) | _pause(longer)
        figures[f"cores_for_{config.samples_per_s:g}_per_s"] = _cores(config, figures["images_per_cpu_s"])
    if "s3" in cases:
        figures |= _from_s3(data, config)
    if "ray" in cases:
        bare = figures.get("images_per_s_per_core") or _median_rate(data, config.repeats)
        figures |= _through_ray(longer)
        figures["ratio_ray_vs_bare"] = round(figures["ray_images_per_s"] / bare, 3)
        figures[f"ray_cores_for_{config.samples_per_s:g}_per_s"] = _cores(config, figures["ray_images_per_s"])
    return figures


def _cores(config: BenchmarkConfig, images_per_s: float) -> int:
    return math.ceil(config.samples_per_s / images_per_s)


class Rate(NamedTuple):
    """Pictures a second, by the clock and by this process's processor time."""

    clock: float
    core: float


def _one_core(data: Data, repeats: int) -> dict[str, Any]:
    sides = {"ours": lambda: _count(Stream(data.spec(1)).batches(_BATCH)), "bare": lambda: _bare(data)}
    sides["open_clip"] = _open_clip(data)
    with _pinned():
        for side in sides.values():
            side()
        rounds = [{name: _rate(side) for name, side in sides.items()} for _ in range(repeats)]

    def ratio(peer: str, kind: str) -> float:
        ratios = (getattr(r["ours"], kind) / getattr(r[peer], kind) for r in rounds)
        return round(statistics.median(ratios), 3)

    rates = {name: round(statistics.median(r[name].clock for r in rounds), 1) for name in sides}
    return {
        "images_per_s_per_core": rates["ours"],
        "open_clip_images_per_s_per_core": rates["open_clip"],
        "bare_images_per_s_per_core": rates["bare"],
        "images_per_cpu_s": round(statistics.median(r["ours"].core for r in rounds), 1),
        "ratio_vs_open_clip": ratio("open_clip", "clock"),
        "ratio_vs_bare_decode": ratio("bare", "clock"),
        "ratio_vs_open_clip_by_cpu": ratio("open_clip", "core"),
        "ratio_vs_bare_decode_by_cpu": ratio("bare", "core"),
    }


def _pause(data: Data) -> dict[str, Any]:
    """How long a batch is waited for at an epoch's end, and elsewhere."""
    rows: list[tuple[float, int, int]] = []
    with _pinned():
        for batch in Stream(data.spec(_EPOCHS)).batches(_BATCH):
            rows.append(_note(batch))
    return _gaps(np.array(rows), data)


def _from_s3(data: Data, config: BenchmarkConfig) -> dict[str, Any]:
    """The same stream from S3 and from disk, in turn; over the network it also waits, and its threads take part."""
    few = max(_BATCH, int(_S3_SHARE * config.images))
    with tempfile.TemporaryDirectory() as folder, s3_server() as address:
        data = Data(Path(folder), data.side, few)
        remote = data.copy_to(address)
        sides = {
            "s3": lambda: _count(Stream(data.spec(1, remote)).batches(_BATCH)),
            "local": lambda: _count(Stream(data.spec(1)).batches(_BATCH)),
        }
        with _pinned():
            for side in sides.values():
                side()
            rounds = [{name: _rate(side) for name, side in sides.items()} for _ in range(config.repeats)]
    return {
        "s3_images_per_s_per_core": round(statistics.median(r["s3"].clock for r in rounds), 1),
        "s3_ratio_vs_local": round(statistics.median(r["s3"].clock / r["local"].clock for r in rounds), 3),
        "s3_ratio_vs_local_by_cpu": round(statistics.median(r["s3"].core / r["local"].core for r in rounds), 3),
    }


@contextmanager
def _pinned() -> Iterator[None]:
    """This process on one core, with one thread."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)


def _rate(side: Callable[[], int]) -> Rate:
    started, cpu_before = time.perf_counter(), time.process_time()
    count = side()
    return Rate(count / (time.perf_counter() - started), count / (time.process_time() - cpu_before))


def _median_rate(data: Data, repeats: int) -> float:
    """Of the stream without Ray."""
    with _pinned():
        rates = [_rate(lambda: _count(Stream(data.spec(1)).batches(_BATCH))).clock for _ in range(1 + repeats)]
    return round(statistics.median(rates[1:]), 1)


def _count(source: Iterable[Batch]) -> int:
    return sum(len(batch["row"]) for batch in source)


def _bare(data: Data) -> int:
    draws = np.random.default_rng(0).random((len(data.files), 4))
    for file, draw in zip(data.files, draws, strict=True):
        crop_image(file, partial(random_box, scale=SCALE, ratio=RATIO, draws=draw), IMAGE_SIZE)
    return len(data.files)


def _open_clip(data: Data) -> Callable[[], int]:
    """A pass of open_clip's training data, as its training script makes it from its defaults."""
    open_clip, train_data = load_open_clip(), load_open_clip_data()
    arguments = SimpleNamespace(
        train_data=f"{data.folder}/{{000000..{data.num_shards - 1:06}}}.tar", train_num_samples=len(data.files),
        dataset_resampled=False, train_data_upsampling_factors=None, seed=0, batch_size=_BATCH, workers=0, world_size=1,
    )  # fmt: skip
    transform = open_clip.image_transform(IMAGE_SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    loader = train_data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader
    return lambda: sum(len(image) for image, _ in loader)


def _through_ray(data: Data) -> dict[str, Any]:
    """One reader on one core, and a train worker on another that takes batches and does nothing with them."""
    connect(local_cpus=2)
    spec = data.spec(_EPOCHS)
    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            _consume,
            train_loop_config={"told": f"{storage}/batches.npy"},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="loader", storage_path=storage),
            datasets={"train": ray.data.range(1)},  # stands for the stream
            dataset_config=StreamConfig(spec, f"{storage}/loader"),
        )
        trainer.fit()
        rows = np.load(f"{storage}/batches.npy")
    counts = rows[:, 1]
    settled = rows[np.searchsorted(counts.cumsum(), _SETTLED * counts.sum()) :]
    rate = settled[1:, 1].sum() / (settled[-1, 0] - settled[0, 0])
    return {"ray_images_per_s": round(float(rate), 1)} | {f"ray_{k}": v for k, v in _gaps(settled, data).items()}


def _consume(config: dict[str, str]) -> None:
    shard = ray.train.get_dataset_shard("train")
    np.save(config["told"], [_note(batch) for batch in shard.batches(_BATCH)])


def _note(batch: Batch) -> tuple[float, int, int]:
    """When a batch came, its samples, and its last position."""
    real = batch["position"][batch["position"] >= 0]
    return time.perf_counter(), len(real), int(real.max(initial=0))


def _gaps(rows: np.ndarray, data: Data) -> dict[str, float]:
    """The longest wait for a batch around an epoch's end, and in other windows: their median, and the longest of all.

    By windows, since their batches come in a burst.
    """
    gaps, epochs = np.diff(rows[:, 0]), rows[:, 2] // len(data.manifest)
    burst = WINDOW * CHUNK // _BATCH
    ends = np.flatnonzero(np.diff(epochs) > 0)
    around = np.zeros(len(gaps), dtype=bool)
    for end in ends:
        around[max(0, end - burst + 1) : end + burst] = True
    elsewhere = np.flatnonzero(~around)
    bursts = [gaps[elsewhere[at : at + burst]].max() for at in range(0, len(elsewhere), burst)]
    return {
        "wait_at_an_epochs_end_s": round(float(gaps[around].max(initial=0.0)), 3),
        "wait_elsewhere_s": round(float(np.median(bursts)), 3),
        "longest_wait_elsewhere_s": round(float(np.max(bursts)), 3),
    }
