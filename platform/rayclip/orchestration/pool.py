"""Parts of an output as one Ray Data job: a row is a part; an actor of a pool, its model at hand, does all of it."""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch

from rayclip.config import WorkersConfig
from rayclip.errors import UserError
from rayclip.orchestration.cluster import check_resources, connect
from rayclip.orchestration.parts import Part, PartFolder, Tally, add, check_bad, told_causes
from rayclip.orchestration.progress import ProgressLine

Work = Callable[[int], Part]
"""From a part's number to the part."""

# A handful of bad samples at the start of a run says little about the share of them in all.
_SAMPLES_BEFORE_JUDGING = 1000
# Ray Data holds every block's input from the start. With more parts than this, a block is several.
_MOST_BLOCKS = 2000


def start(folder: PartFolder, workers: WorkersConfig) -> dict[str, Any] | None:
    """Make the output and the cluster ready; the summary of an output that is complete already, for which nothing is.

    Raises UserError for an output that holds something else, and a cluster without room for the workers.
    """
    folder.check()
    complete = folder.read_summary()
    if complete is not None:
        ProgressLine(complete["samples"]).note(f"'{folder.path}' is complete already")
        return complete
    connect(local_cpus=int(workers.num_workers * workers.cpus_per_worker))
    needed = {"CPU": workers.num_workers * workers.cpus_per_worker, "GPU": workers.num_workers * workers.use_gpu}
    check_resources({k: v for k, v in needed.items() if v}, f"a job with {workers.num_workers} workers")
    folder.begin()
    return None


def run_parts(
    folder: PartFolder, make: Callable[[], Work], workers: WorkersConfig, total_samples: int, max_bad_fraction: float
) -> dict[str, Any]:
    """Write the parts that are missing, and sum up. `make` is called once in each worker, for what does the work.

    Raises the UserError of a worker, and one where more samples have an error than is allowed.
    """
    missing, tally = folder.missing()
    num_before = tally["rows"]["samples"]
    progress = ProgressLine(total_samples, start=num_before)
    if num_before:
        progress.note(f"going on with '{folder.path}': {folder.num_parts - len(missing):,} parts are there")
    started = time.monotonic()
    busy_s = 0.0
    for done in _run(folder, make, workers, missing):
        tally = add([tally, done.tally])
        busy_s += done.seconds
        progress.update(tally["rows"]["samples"], bad=told_causes(tally) or "0")
        if tally["rows"]["samples"] >= _SAMPLES_BEFORE_JUDGING:
            check_bad(tally, max_bad_fraction)
    progress.close()
    check_bad(tally, max_bad_fraction)
    num_new = tally["rows"]["samples"] - num_before
    summary = {
        "output": str(folder.path),
        "model_version": folder.identity.get("model_version"),
        "source": folder.identity["source"],
        **tally.pop("rows"),
        **tally,
        "parts": folder.num_parts,
        "new_samples": num_new,
        "time_s": round(time.monotonic() - started, 1),
        # While they work: the time in which workers start and load their model is in time_s.
        "samples_per_s": round(num_new / busy_s * min(workers.num_workers, len(missing)), 1) if busy_s else 0.0,
    }
    folder.write_summary(summary)
    return summary


@dataclass(frozen=True)
class _Done:
    """A part that lies there."""

    tally: Tally
    seconds: float


def _run(folder: PartFolder, make: Callable[[], Work], workers: WorkersConfig, parts: list[int]) -> Iterator[_Done]:
    """Do the parts somewhere in the cluster; results come as they are ready."""
    if not parts:
        return
    rows = [{"part": part} for part in parts]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS)).map(
        _Worker,  # type: ignore[arg-type]
        fn_constructor_args=(folder, make, max(1, int(workers.cpus_per_worker))),
        compute=ray.data.ActorPoolStrategy(size=min(workers.num_workers, len(parts))),
        num_cpus=workers.cpus_per_worker,
        num_gpus=int(workers.use_gpu),
    )
    results = iter(dataset.iter_rows())
    with _silent_stderr():
        first = next(results)
    for row in chain([first], results):
        done = pickle.loads(row["done"])
        if isinstance(done, UserError):
            raise done
        yield done


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Until a pool has started: Ray warns of each whose actors may restart, from C++, where no log level reaches it.

    See ray-project/ray#57733. What goes wrong meanwhile is raised.
    """
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _Worker:
    """An actor of the pool. A UserError comes back as a result; Ray would wrap it in a traceback."""

    def __init__(self, folder: PartFolder, make: Callable[[], Work], threads: int) -> None:
        torch.set_num_threads(threads)
        self._folder = folder
        self._make = make
        self._work: Work | None = None

    def __call__(self, row: dict[str, np.generic]) -> dict[str, bytes]:
        try:
            return {"done": pickle.dumps(self._do(int(row["part"])))}
        except UserError as error:
            return {"done": pickle.dumps(error)}

    def _do(self, number: int) -> _Done:
        # A worker that was lost may have come as far as writing it.
        tally = self._folder.tally(number)
        if tally is not None:
            return _Done(tally, 0.0)
        if self._work is None:
            self._work = self._make()
        started = time.monotonic()
        self._folder.note_attempt(number)
        part = self._work(number)
        self._folder.write(number, part)
        return _Done(part.tally, time.monotonic() - started)
