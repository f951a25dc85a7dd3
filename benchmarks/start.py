"""Where the seconds go from a command to the first training step, to the end of a short run, and to the first picture.

Each command is a process of its own, as a user would start it: the demo's model on two workers for 600 samples, with a
new folder and a new MLflow database each time; then `evaluate` on the checkpoint. `start_marks` notes when each moment
is reached. With `checkout`, another version (a release's worktree) does the same, in turn with this one. Moments are
seconds since the command; what runs beside other work is not taken apart.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.config import BenchmarkConfig
from benchmarks.pause import write_data
from rayclip.errors import UserError

_HERE = Path(__file__).resolve().parents[1]
_MARKS = Path(__file__).parent / "start_marks"
_SAMPLES, _PICTURES = 600, 1_024

TRAIN_MOMENTS = {
    "python": ("python:begin", min),
    "settings": ("load:end", min),
    "ray_begun": ("init:begin", min),
    "ray_up": ("init:end", min),
    "mlflow_run_open": ("open_run:end", min),
    "training_begun": ("DataParallelTrainer.fit:begin", min),
    "workers_up": ("train_worker:begin", max),
    "model_ready": ("Trainer.run:begin", max),
    "first_batch": ("Trainer._step:begin", max),
    "first_step": ("Trainer._step:end", max),
    "trained": ("Trainer.run:end", max),
    "training_ended": ("DataParallelTrainer.fit:end", min),
}
"""What is reached in a training run, by whom: the first of the processes, or the last of them."""
EVALUATE_MOMENTS = {
    "python": ("python:begin", min),
    "ray_begun": ("init:begin", min),
    "ray_up": ("init:end", min),
    "first_picture": ("Encoder.encode_pooled:end", min),
}


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Median seconds from the command to each moment, of this version and of the other one. Raises UserError."""
    versions = {"": _HERE} | ({"before_": Path(config.checkout).resolve()} if config.checkout else {})
    rows: dict[str, list[dict[str, float]]] = {prefix: [] for prefix in versions}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder / "data", _PICTURES)
        (folder / "measured").mkdir()
        write_data(folder / "measured" / "test", _PICTURES)
        for repeat in range(config.repeats):
            for prefix, checkout in versions.items():
                rows[prefix].append(_measure(checkout, folder / f"{prefix}{repeat}", config.workers))
    figures: dict[str, Any] = {"samples": _SAMPLES, "workers": config.workers, "repeats": config.repeats}
    figures["load_average"] = round(os.getloadavg()[0], 1)
    for prefix, measured in rows.items():
        for moment in measured[0]:
            figures[f"{prefix}{moment}_s"] = round(statistics.median(row[moment] for row in measured), 2)
    if config.checkout:
        figures["ratio_first_step"] = round(figures["before_train.first_step_s"] / figures["train.first_step_s"], 2)
        figures["ratio_whole_run"] = round(figures["before_train.end_s"] / figures["train.end_s"], 2)
    return figures


def _measure(checkout: Path, folder: Path, workers: int) -> dict[str, float]:
    folder.mkdir()
    data, measured = folder.parent / "data", folder.parent / "measured"
    tracking = f"sqlite:///{folder}/mlflow.db"
    run, suite = folder / "run.yaml", folder / "suite.yaml"
    run.write_text(json.dumps(_train_settings(folder, data, tracking, workers)))
    suite.write_text(json.dumps(_suite_settings(folder, measured, tracking)))
    train = _command(checkout, folder / "train", ["jobs.train", str(run)], TRAIN_MOMENTS)
    checkpoint = next((folder / "runs/start/checkpoints").glob("samples-*"))
    evaluate = _command(checkout, folder / "evaluate", ["jobs.evaluate", str(checkpoint), str(suite)], EVALUATE_MOMENTS)
    return {f"train.{key}": value for key, value in train.items()} | {
        f"evaluate.{key}": value for key, value in evaluate.items()
    }


def _command(checkout: Path, marks: Path, arguments: list[str], moments: dict[str, Any]) -> dict[str, float]:
    """Seconds from the start of a command to each moment, and to its end."""
    paths = [str(checkout / "platform"), str(checkout), str(_MARKS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAYCLIP_START_MARKS": str(marks)}
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    ended = time.time()
    if done.returncode:
        raise UserError(f"{' '.join(arguments)} in '{checkout}' failed: {done.stderr.strip()[-500:]}")
    reached: dict[str, list[float]] = {}
    for line in marks.read_text().splitlines():
        at, _, _, moment = line.split()
        reached.setdefault(moment, []).append(float(at) - started)
    seconds = {name: which(reached[mark]) for name, (mark, which) in moments.items() if mark in reached}
    return seconds | {"end": ended - started}


def _train_settings(folder: Path, data: Path, tracking: str, workers: int) -> dict[str, Any]:
    return {
        "name": "start",
        "runs": str(folder / "runs"),
        "model": {
            "embed_dim": 128,
            "vision": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "heads": 4},
            "text": {"context_length": 32, "width": 128, "layers": 2, "heads": 4},
        },
        "data": {"path": str(data)},
        "samples": _SAMPLES,
        "batch_size": 60,
        "tracking": {"uri": tracking},
        "cluster": {"num_workers": workers},
    }


def _suite_settings(folder: Path, measured: Path, tracking: str) -> dict[str, Any]:
    return {
        "name": "start",
        "root": str(measured.parent),
        "datasets": {"start": {"path": str(measured), "tasks": ["zero_shot"]}},
        "output": str(folder / "report"),
        "cache": str(folder / "features"),
        "tracking_uri": tracking,
        "cluster": {"num_workers": 1},
    }
