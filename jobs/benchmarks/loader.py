"""Pictures a second from JPEGs in tar shards to batches: one core, and through Ray into a train worker.

On one core, in turn and pinned to the same core: the stream of a training run; open_clip's own webdataset pipeline with
its transforms and tokenizer, in the process itself (workers=0: on one core a worker process would only add copies); and
the bare loop, which has every file in memory and does nothing but decode, crop and resize.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from jobs.benchmarks.peers import load_open_clip, load_open_clip_data
from jobs.benchmarks.workload import jpegs, labels
from rayclip.config import BenchmarkConfig
from rayclip.data.decode import crop_picture, random_box
from rayclip.data.formats.tar import Sample, Span, write_shard
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.orchestration.cluster import connect
from rayclip.orchestration.stream import batches, remaining_dataset

_SIDES = (600, 256)
_IMAGE_SIZE, _CONTEXT = 224, 77
_SCALE, _RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
_BATCH = 128
_DIFFERENT = 24
_SHARD, _CHUNK = 256, 64
_PASSES_THROUGH_RAY = 8
_SETTLED = 0.25
"""Share of the samples after which the rate through Ray is measured: workers have started, buffers are full."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Rates and ratios, those of 600 px without a suffix. Raises UserError without open_clip."""
    load_open_clip()
    report: dict[str, Any] = {"pictures": config.pictures, "image_size": _IMAGE_SIZE}
    for side in _SIDES:
        with tempfile.TemporaryDirectory() as folder:
            data = Data(Path(folder), side, config.pictures)
            figures = _one_core(data, config.repeats) | _through_ray(data)
        figures["ratio_ray_vs_bare"] = round(figures["ray_images_per_s"] / figures["images_per_s_per_core"], 3)
        cores = math.ceil(config.samples_per_s / figures["ray_images_per_s"])
        figures[f"cores_for_{config.samples_per_s:g}_per_s"] = cores
        suffix = "" if side == _SIDES[0] else f"_{side}px"
        report |= {key + suffix: value for key, value in figures.items()}
    return report


class Data:
    """A data set of square JPEGs, on disk and in memory."""

    def __init__(self, folder: Path, side: int, pictures: int) -> None:
        files = jpegs(side, _DIFFERENT)
        self.files = [files[i % len(files)] for i in range(pictures)]
        shards: list[tuple[str, int, list[Span]]] = []
        for first in range(0, pictures, _SHARD):
            path = folder / f"{len(shards):06}.tar"
            with path.open("wb") as target:
                spans = write_shard(target, map(self._sample, range(first, min(first + _SHARD, pictures))), _CHUNK)
            shards.append((path.name, path.stat().st_size, spans))
        self.folder, self.num_shards = folder, len(shards)
        self.manifest = Manifest.from_spans(folder, shards)
        self.manifest.save()

    def spec(self, epochs: int) -> StreamSpec:
        """The stream of a run over it."""
        return StreamSpec(
            folder=str(self.folder), digest=self.manifest.digest, seed=0, end=epochs * len(self.manifest), window=8,
            image_size=_IMAGE_SIZE, context_length=_CONTEXT, crop_scale=_SCALE, crop_ratio=_RATIO,
        )  # fmt: skip

    def _sample(self, number: int) -> Sample:
        names = labels()
        caption = f"a photo of a {names[number % len(names)]} beside {number} others"
        return {"__key__": f"{number:09}".encode(), "jpg": self.files[number], "txt": caption.encode()}


def _one_core(data: Data, repeats: int) -> dict[str, Any]:
    sides = {"ours": lambda: _count(Stream(data.spec(1)).batches(_BATCH)), "bare": lambda: _bare(data)}
    sides["open_clip"] = _open_clip(data)
    with _pinned():
        for side in sides.values():
            side()
        rounds = [{name: _rate(side) for name, side in sides.items()} for _ in range(repeats)]
    rates = {name: statistics.median(r[name] for r in rounds) for name in sides}
    return {
        "jpeg_kb": round(statistics.mean(map(len, data.files)) / 1000, 1),
        "images_per_s_per_core": round(rates["ours"], 1),
        "open_clip_images_per_s_per_core": round(rates["open_clip"], 1),
        "bare_images_per_s_per_core": round(rates["bare"], 1),
        "ratio_vs_open_clip": round(statistics.median(r["ours"] / r["open_clip"] for r in rounds), 3),
        "ratio_vs_bare_decode": round(statistics.median(r["ours"] / r["bare"] for r in rounds), 3),
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


def _rate(side: Callable[[], int]) -> float:
    started = time.perf_counter()
    return side() / (time.perf_counter() - started)


def _count(source: Iterator[dict[str, np.ndarray]]) -> int:
    return sum(len(batch["row"]) for batch in source)


def _bare(data: Data) -> int:
    draws = np.random.default_rng(0).random((len(data.files), 4))
    for file, draw in zip(data.files, draws, strict=True):
        crop_picture(file, partial(random_box, scale=_SCALE, ratio=_RATIO, draws=draw), _IMAGE_SIZE)
    return len(data.files)


def _open_clip(data: Data) -> Callable[[], int]:
    """A pass of open_clip's training data, as its training script makes it from its defaults."""
    open_clip, train_data = load_open_clip(), load_open_clip_data()
    arguments = SimpleNamespace(
        train_data=f"{data.folder}/{{000000..{data.num_shards - 1:06}}}.tar", train_num_samples=len(data.files),
        dataset_resampled=False, train_data_upsampling_factors=None, seed=0, batch_size=_BATCH, workers=0, world_size=1,
    )  # fmt: skip
    transform = open_clip.image_transform(_IMAGE_SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    loader = train_data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader
    return lambda: sum(len(image) for image, _ in loader)


def _through_ray(data: Data) -> dict[str, Any]:
    """One reader on one core, and a train worker on another that takes batches and does nothing with them."""
    connect(local_cpus=2)
    spec = data.spec(_PASSES_THROUGH_RAY)
    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            _consume,
            train_loop_config={"told": f"{storage}/batches.npy"},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="loader", storage_path=storage),
            datasets={"train": partial(remaining_dataset, spec, f"{storage}/loader", 1)},
            dataset_config=ray.train.DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
        )
        trainer.fit()
        seconds, counts, positions = np.load(f"{storage}/batches.npy").T
    epochs = positions // len(data.manifest)
    settled = np.searchsorted(counts.cumsum(), _SETTLED * counts.sum())
    gaps = np.diff(seconds)[settled:]
    ends = np.diff(epochs)[settled:] > 0
    return {
        "ray_images_per_s": round(float(counts[settled + 1 :].sum() / gaps.sum()), 1),
        "ray_largest_gap_s": round(float(gaps.max()), 3),
        "ray_largest_gap_at_an_epochs_end_s": round(float(gaps[ends].max()), 3),
    }


def _consume(config: dict[str, str]) -> None:
    """Note of every batch when it came, its samples, and its last position."""
    told: list[tuple[float, int, int]] = []
    for batch in batches(ray.train.get_dataset_shard("train"), _BATCH):
        real = batch["position"][batch["position"] >= 0]
        told.append((time.perf_counter(), len(real), int(real.max(initial=0))))
    np.save(config["told"], told)
