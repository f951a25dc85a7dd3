"""The model without a service around it: in one process with all the threads, or in several with one each.

Shapes: B pictures; H, W a picture's height and width.
"""

import io
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from benchmarks.workload import TEMPLATE, TOP_K, labels
from rayclip.data.decode import eval_array
from rayclip.data.tokenizer import get_tokenizer
from rayclip.inference.encoder import Encoder
from rayclip.inference.zero_shot import class_matrix, zero_shot_probabilities
from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import load_model

_START_TIMEOUT_S = 120.0


class Layout(NamedTuple):
    """A way to run the tower on the machine."""

    processes: int
    threads: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} threads, batches of {self.batch_size}"


class BareModel:
    """Processes that hold the model and run it when asked; idle, they take no processor time."""

    def __init__(self, workers: Sequence[Connection]) -> None:
        self._workers = workers

    def images_per_s(self, layout: Layout, seconds: float) -> float:
        """The image tower on uint8 batches."""
        workers = self._workers[: layout.processes]
        for worker in workers:
            worker.send(("tower", layout.threads, layout.batch_size, seconds))
        return sum(worker.recv() for worker in workers)

    def best_layout(self, num_cpus: int, batch_sizes: Sequence[int], seconds: float) -> tuple[Layout, dict[str, float]]:
        """The fastest of all, and what each gave, in images a second."""
        shapes = {(1, num_cpus), (len(self._workers), 1)}
        layouts = [Layout(*shape, batch_size) for shape in sorted(shapes) for batch_size in batch_sizes]
        rates = {layout: self.images_per_s(layout, seconds) for layout in layouts}
        return max(layouts, key=rates.__getitem__), {str(layout): round(rates[layout], 1) for layout in layouts}

    def request_ms(self, images: Sequence[bytes], threads: int, count: int, rate: float) -> dict[str, list[float]]:
        """Milliseconds of what a request needs at the least: decode a picture, run the tower, score the labels.

        At `rate` a second, as a service gets them: without a rest between them everything would be in the caches.
        """
        self._workers[0].send(("request", threads, list(images), count, rate))
        answer: dict[str, list[float]] = self._workers[0].recv()
        return answer


@contextmanager
def bare_model(folder: Path, processes: int) -> Iterator[BareModel]:
    """The model of a checkpoint in that many processes."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(processes)]
    workers = [context.Process(target=_work, args=(theirs, str(folder)), daemon=True) for _, theirs in pipes]
    try:
        for worker in workers:
            worker.start()
        for ours, _ in pipes:
            if not ours.poll(_START_TIMEOUT_S) or ours.recv() != "ready":
                raise RuntimeError("the bare model's process did not start")
        yield BareModel([ours for ours, _ in pipes])
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(pipe: Connection, folder: str) -> None:
    model = load_model(folder).eval()
    pipe.send("ready")
    try:
        while True:
            kind, threads, *rest = pipe.recv()
            torch.set_num_threads(threads)
            with torch.inference_mode():
                pipe.send(_run_tower(model, *rest) if kind == "tower" else _run_requests(model, *rest))
    except (EOFError, KeyboardInterrupt):
        pass


def _run_tower(model: CLIP, batch_size: int, seconds: float) -> float:
    side = model.visual.image_size
    image_BHWC = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8)
    model.encode_image(image_BHWC)
    started, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not done:
        model.encode_image(image_BHWC)
        done += batch_size
    return done / elapsed


def _run_requests(model: CLIP, images: list[bytes], count: int, rate: float) -> dict[str, list[float]]:
    matrix = class_matrix(Encoder(model, get_tokenizer(model.context_length), "cpu"), labels(), TEMPLATE)
    logit_scale = model.logit_scale.exp().item()
    times: dict[str, list[float]] = {"decode": [], "tower": [], "score": [], "total": []}
    for index in range(-3, count):  # the first few are not counted
        time.sleep(1 / rate)
        marks = [time.perf_counter()]
        array = eval_array(Image.open(io.BytesIO(images[index % len(images)])), model.visual.image_size)
        marks.append(time.perf_counter())
        features: Tensor = model.encode_image(torch.from_numpy(array)[None])
        marks.append(time.perf_counter())
        scores, classes = zero_shot_probabilities(features, matrix, logit_scale)[0].topk(TOP_K)
        scores.tolist(), classes.tolist()
        marks.append(time.perf_counter())
        if index >= 0:
            stages = [1e3 * (end - begin) for begin, end in pairwise(marks)]
            for name, stage_ms in zip(times, [*stages, sum(stages)], strict=True):
                times[name].append(stage_ms)
    return times
