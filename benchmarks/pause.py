"""How long workers stand still where their model is measured: on themselves, and in a process beside them.

Two runs that differ in nothing else, of the demo's model. A step's time is when its loss was logged; what passes until
the next one, beyond the usual, is the pause: at a checkpoint alone, and at one that is measured.
"""

import statistics
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient

from benchmarks.config import BenchmarkConfig
from benchmarks.workload import labels, pngs
from rayclip.config import TrainConfig
from rayclip.data.formats.tar import Sample, write_shard
from rayclip.data.manifest import Manifest
from rayclip.orchestration.cluster.connection import connect
from rayclip.orchestration.train.driver import run_training
from rayclip.tracking.names import STEP_METRIC

_SIDE = 32
_CHUNK = 64
_TRAINED_ON, _MEASURED_ON = 2_048, 8_192
"""Pictures."""
_MODEL = {
    "embed_dim": 128,
    "vision": {"image_size": _SIDE, "patch_size": 8, "width": 128, "layers": 4, "heads": 4},
    "text": {"context_length": 32, "width": 128, "layers": 2, "heads": 4},
}


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Seconds between a step and the next, both ways. Raises UserError."""
    connect(local_cpus=config.workers + 2)  # the same for both, with a reader and what measures
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder / "train", _TRAINED_ON)
        write_data(folder / "measured", _MEASURED_ON)
        on_workers, beside = (_gaps(_run(config, folder, beside)) for beside in (False, True))
    report: dict[str, Any] = {"workers": config.workers, "pictures_measured": _MEASURED_ON}
    for name, gaps in (("on_workers", on_workers), ("beside", beside)):
        report |= {f"{key}_{name}": round(value, 3) for key, value in gaps.items()}
    return report


def _gaps(run: tuple[TrainConfig, list[tuple[int, float]]]) -> dict[str, float]:
    config, points = run
    gaps = {before[0]: after[1] - before[1] for before, after in pairwise(points)}
    every = config.checkpoint.every_samples
    measured = [gap for step, gap in gaps.items() if not step % (2 * every)]
    saved = [gap for step, gap in gaps.items() if step % (2 * every) == every]
    steady = [gap for step, gap in gaps.items() if step % every]
    return {
        "step_s": statistics.median(steady),
        "at_a_checkpoint_s": statistics.median(saved),
        "at_a_measured_one_s": statistics.median(measured),
        "first_to_last_step_s": points[-1][1] - points[0][1],
    }


def _run(config: BenchmarkConfig, folder: Path, beside: bool) -> tuple[TrainConfig, list[tuple[int, float]]]:
    """The run, and (samples seen, seconds) of its steps."""
    every = config.samples // 6 // _CHUNK * _CHUNK
    run = TrainConfig.model_validate(
        {
            "name": f"beside-{beside}",
            "runs": str(folder / "runs"),
            "model": _MODEL,
            "data": {"path": str(folder / "train")},
            "samples": 6 * every,
            "batch_size": _CHUNK,
            "evaluation": {
                "every_samples": 2 * every,
                "asynchronous": beside,
                "tasks": {"labels": {"kind": "zero_shot", "path": str(folder / "measured")}},
            },
            "checkpoint": {"every_samples": every},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "log_every_samples": _CHUNK},
            "cluster": {"num_workers": config.workers},
        }
    )
    summary = run_training(run)
    points = MlflowClient(run.tracking.uri).get_metric_history(summary["mlflow_run_id"], STEP_METRIC)
    return run, [(point.step, point.timestamp / 1000) for point in points]


def write_data(folder: Path, count: int) -> None:
    """Write a data set of so many labelled pictures."""
    folder.mkdir()
    shard = folder / "0.tar"
    with shard.open("wb") as file:
        spans = write_shard(file, _samples(count), _CHUNK)
    Manifest.from_spans(folder, [(shard.name, shard.stat().st_size, spans)]).save()
    (folder / "classnames.txt").write_text("\n".join(labels()) + "\n")


def _samples(count: int) -> Iterator[Sample]:
    images, names = pngs(_SIDE), labels()
    for i, label in enumerate(np.random.default_rng(0).integers(len(names), size=count).tolist()):
        files = {"png": images[i % len(images)], "txt": names[label].encode(), "cls": str(label).encode()}
        yield {"__key__": f"{i:06}".encode(), **files}
