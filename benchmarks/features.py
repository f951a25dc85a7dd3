"""Features of images through a pool of Ray actors beside the same code without it, and beside the image tower alone.

All three run in as many processes, with one thread each. What is not counted is what happens once: starting processes,
loading the model.
"""

import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.bare import Layout, bare_model
from benchmarks.config import BenchmarkConfig
from rayclip.config import SuiteConfig
from rayclip.data.formats.tar import Sample, write_shard
from rayclip.data.manifest import Manifest
from rayclip.evaluation.suite import open_suite
from rayclip.models.clip import CLIP
from rayclip.models.presets import preset as preset_of
from rayclip.models.weights import Weights, write_weights
from rayclip.orchestration.batch.embed import open_model
from rayclip.orchestration.batch.features import Extraction, images_of
from rayclip.orchestration.batch.output_jobs import run_jobs
from rayclip.orchestration.batch.task_runner import connect_for

_CLASSES = ("a", "b")
_SIDE = 256


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Pictures a second each way, in turn, and Ray's share of the others. Raises UserError."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_model(folder / "model", config.preset)
        _write_images(folder / "data" / "pictures", config.samples, config.batch_size)
        rates = [_measure(config, folder, repeat) for repeat in range(config.repeats)]
    tower, bare, through_ray = (statistics.median(column) for column in zip(*rates, strict=True))
    return {
        "preset": config.preset,
        "pictures": f"{config.samples} JPEG of {_SIDE} px",
        "workers": config.workers,
        "batch_size": config.batch_size,
        "tower_per_s": round(tower, 2),
        "without_ray_per_s": round(bare, 2),
        "through_ray_per_s": round(through_ray, 2),
        "ray_of_without": round(statistics.median(ray / bare for _, bare, ray in rates), 3),
        "ray_of_tower": round(statistics.median(ray / tower for tower, _, ray in rates), 3),
    }


def _measure(config: BenchmarkConfig, folder: Path, repeat: int) -> tuple[float, float, float]:
    suite = SuiteConfig.model_validate(
        {
            "name": "benchmark",
            "model": str(folder / "model"),
            "root": str(folder / "data"),
            "datasets": {"pictures": {}},
            "cache": str(folder / f"cache-{repeat}"),
            "batch_size": config.batch_size,
            "part_samples": config.batch_size,
            "cluster": {"num_workers": config.workers},
        }
    )
    model = open_model(suite.model, None)
    extraction = images_of(open_suite(suite).datasets[0], model, suite)
    with bare_model(folder / "model", config.workers) as bare:
        tower = bare.images_per_s(Layout(config.workers, 1, config.batch_size), config.window_s)
    return tower, _without_ray(extraction, config.workers), _through_ray(extraction, suite)


def _through_ray(extraction: Extraction, suite: SuiteConfig) -> float:
    """Counted from when every worker has finished a part."""
    connect_for(suite.cluster)
    output = extraction.job.output
    parts = [(0, part) for part in range(output.num_parts)]
    with output.writing():
        finished = [
            (time.perf_counter(), result.tally["rows"]["samples"])
            for result in run_jobs([extraction.job], suite.cluster, parts)
        ]
    first = suite.cluster.num_workers - 1
    return sum(samples for _, samples in finished[first + 1 :]) / (finished[-1][0] - finished[first][0])


def _without_ray(extraction: Extraction, workers: int) -> float:
    """The same parts, shared out beforehand; the first of each process is not counted."""
    context = multiprocessing.get_context("spawn")
    shares = [range(worker, extraction.job.output.num_parts, workers) for worker in range(workers)]
    pipes = [context.Pipe() for _ in shares]
    processes = [
        context.Process(target=_work, args=(theirs, extraction.job.make, list(share)), daemon=True)
        for (_, theirs), share in zip(pipes, shares, strict=True)
    ]
    for process in processes:
        process.start()
    for ours, _ in pipes:
        ours.recv()
    started = time.perf_counter()
    for ours, _ in pipes:
        ours.send("go")
    samples = sum(ours.recv() for ours, _ in pipes)
    elapsed = time.perf_counter() - started
    for process in processes:
        process.join()
    return samples / elapsed


def _work(pipe: Connection, make: partial[Any], parts: list[int]) -> None:
    torch.set_num_threads(1)
    work = make()
    work(parts[0])
    pipe.send("ready")
    pipe.recv()
    pipe.send(sum(work(part).table.num_rows for part in parts[1:]))


def _write_model(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    config = preset_of(name)
    write_weights(folder, Weights(config, CLIP(config).state_dict(), "rayclip"), "rayclip", "benchmark")


def _write_images(folder: Path, count: int, part_samples: int) -> None:
    (folder / "test").mkdir(parents=True)
    shard = folder / "test" / "0.tar"
    with shard.open("wb") as file:
        spans = write_shard(file, _samples(count), part_samples)
    Manifest.from_spans(shard.parent, [(shard.name, shard.stat().st_size, spans)]).save()
    (folder / "classnames.txt").write_text("\n".join(_CLASSES))


def _samples(count: int) -> Iterator[Sample]:
    generator = np.random.default_rng(0)
    for index in range(count):
        # As detailed as a photo, about: a coarse picture enlarged.
        coarse = Image.fromarray(generator.integers(0, 256, (_SIDE // 8, _SIDE // 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield {"__key__": f"{index:06}".encode(), "jpg": file.getvalue(), "cls": str(index % 2).encode()}
