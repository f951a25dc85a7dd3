"""Our queue, which gathers while the model is busy, beside ray.serve.batch: one process, one tower, the same arrivals.

Everything runs inside one replica of a Serve deployment, since ray.serve.batch works nowhere else; no HTTP and no other
process is between the arrivals and the queue.

Shapes: B pictures; H, W a picture's height and width; E embedding.
"""

import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from benchmarks import workload
from benchmarks.config import BenchmarkConfig
from benchmarks.open_loop import Outcome, arrivals
from rayclip.models.presets import preset
from rayclip.orchestration.cluster.connection import connect
from rayclip.serve.towers.batching import GatherQueue
from rayclip.training.checkpoint import load_model

GATHER = "GatherQueue"
_MODELS = {"small": "ViT-Micro/8@32", "ViT-B/32": "ViT-B/32"}
_SHARES = {"small": (0.2, 0.5, 0.8), "ViT-B/32": (0.5, 0.8)}
"""Rates, as shares of what the tower does in full batches."""
_WINDOWS = {"small": 0.25, "ViT-B/32": 1.0}
"""How long each is looked at, as shares of window_s: the small model answers hundreds of requests a second."""
_MAX_BATCH_SIZE = 32
_PATIENCE_S = 10.0


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Both queues at rising rates, in turn."""
    window_s: float = config.window_s
    figures: dict[str, Any] = {"max_batch_size": _MAX_BATCH_SIZE}
    with tempfile.TemporaryDirectory() as scratch:
        connect(local_cpus=2)
        try:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
            for name, preset_name in _MODELS.items():
                folder = workload.write_random_checkpoint(Path(scratch) / name.replace("/", "_"), preset(preset_name))
                figures[name] = _measure(name, folder, _WINDOWS[name] * window_s, config.repeats)
        finally:
            serve.shutdown()
            ray.shutdown()
    return figures


def _measure(name: str, folder: Path, seconds: float, repeats: int) -> dict[str, Any]:
    deployment: Any = serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 1})(Tower)
    tower: Any = serve.run(deployment.bind(str(folder)), name="batching", route_prefix=None)
    batch_s = tower.batch_seconds.remote().result()
    capacity = _MAX_BATCH_SIZE / batch_s
    figures: dict[str, Any] = {
        "full_batch_ms": round(1e3 * batch_s, 2),
        "full_batch_images_per_s": round(capacity, 1),
        "rows": [],
    }
    for share in _SHARES[name]:
        runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in _variants(batch_s)}
        for seed in range(repeats):
            for variant, wait_s in _variants(batch_s).items():
                runs[variant].append(tower.measure.remote(variant, wait_s, share * capacity, seconds, seed).result())
        rows = {variant: _medians(each) for variant, each in runs.items()}
        for variant, row in rows.items():
            figures["rows"].append({"queue": variant, "share": share, **row})
            print(f"{name}: {figures['rows'][-1]}", file=sys.stderr, flush=True)
        ours, others = rows[GATHER], [row for variant, row in rows.items() if variant != GATHER]
        # Of each figure the best that any of its waits gives, which no single one does at every rate.
        figures[f"answered_ratio_vs_serve_batch_at_{share}"] = _ratio(ours, max, others, "answered_per_s")
        for key in ("p50_ms", "p99_ms"):
            figures[f"{key}_ratio_vs_serve_batch_at_{share}"] = _ratio(ours, min, others, key)
    return figures


def _ratio(
    ours: dict[str, float], best: Callable[[list[float]], float], others: list[dict[str, float]], key: str
) -> float:
    return round(ours[key] / best([row[key] for row in others]), 3)


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}


def _variants(batch_s: float) -> dict[str, float]:
    """Names of the queues, and how long ray.serve.batch waits for a batch to fill."""
    waits = {"no wait": 0.0, "10 ms, its default": 0.01, "a full batch's time": batch_s}
    return {GATHER: 0.0, **{f"serve.batch, waits {name}": wait_s for name, wait_s in waits.items()}}


class Tower:
    """The image tower behind either queue."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self._model = load_model(folder).eval()
        side = self._model.visual.image_size
        self._image_HWC = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        self._executor = ThreadPoolExecutor(1)
        self._sizes: list[int] = []
        self._queue: GatherQueue[np.ndarray, np.ndarray] = GatherQueue(
            self._encode, _MAX_BATCH_SIZE, max_waiting=1_000_000, executor=self._executor
        )

    async def batch_seconds(self) -> float:
        """Median time of a full batch."""
        times = []
        for _ in range(7):
            started = time.perf_counter()
            await asyncio.get_running_loop().run_in_executor(
                self._executor, self._encode, [self._image_HWC] * _MAX_BATCH_SIZE
            )
            times.append(time.perf_counter() - started)
        return sorted(times)[3]

    async def measure(self, variant: str, wait_s: float, rate: float, seconds: float, seed: int) -> dict[str, float]:
        """One queue under an open-loop load of single pictures."""
        # Methods that Serve puts onto the decorated function; its types do not know of them.
        self._batched.set_batch_wait_timeout_s(wait_s)  # type: ignore[attr-defined]
        submit = self._gathered if variant == GATHER else self._batched
        await asyncio.gather(*(submit(self._image_HWC) for _ in range(_MAX_BATCH_SIZE)))
        self._sizes.clear()
        outcome = await _load(lambda: submit(self._image_HWC), arrivals(rate, seconds, even=False, seed=seed), seconds)
        figures = outcome.summary()
        return {
            "rate_per_s": round(rate, 1),
            "answered_per_s": round(len(outcome.answered) / max([seconds, *outcome.done_s]), 1),
            "mean_batch": round(sum(self._sizes) / max(1, len(self._sizes)), 1),
            **{key: figures[key] for key in ("p50_ms", "p95_ms", "p99_ms", "unanswered", "growth_s_per_s")},
        }

    async def _gathered(self, image_HWC: np.ndarray) -> np.ndarray:
        return (await self._queue.submit([image_HWC]))[0]

    @serve.batch(max_batch_size=_MAX_BATCH_SIZE)
    async def _batched(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._encode, images)

    def _encode(self, images: list[np.ndarray]) -> list[np.ndarray]:
        self._sizes.append(len(images))
        with torch.inference_mode():
            features_BE = self._model.encode_image(torch.from_numpy(np.stack(images))).numpy()
        return list(features_BE)


async def _load(submit: Callable[[], Awaitable[object]], due_s: list[float], seconds: float) -> Outcome:
    """Calls that do not wait for each other; latency counts from the moment a call was due."""
    sent_s, done_s, status = [0.0] * len(due_s), [0.0] * len(due_s), [0] * len(due_s)
    started, cpu_s = time.perf_counter(), time.process_time()

    async def one(row: int) -> None:
        sent_s[row] = time.perf_counter() - started
        try:
            await submit()
            status[row] = 200
        finally:
            done_s[row] = time.perf_counter() - started

    tasks = []
    for row, due in enumerate(due_s):
        if (ahead := due - (time.perf_counter() - started)) > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.create_task(one(row)))
    _, late = await asyncio.wait(tasks, timeout=_PATIENCE_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Outcome(seconds, due_s, sent_s, done_s, status, [""] * len(due_s), time.process_time() - cpu_s)
