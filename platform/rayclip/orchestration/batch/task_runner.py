"""Parts of an output as one Ray Data job: a row is a part; an actor of a pool, its model at hand, does all of it."""

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import ray.data
import torch

from rayclip.config import WorkersConfig
from rayclip.errors import UserError
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, Tally, add, check_bad, format_causes
from rayclip.orchestration.cluster.connection import check_resources, connect
from rayclip.orchestration.cluster.progress import ProgressLine
from rayclip.orchestration.cluster.ray_internals import silent_stderr
from rayclip.orchestration.cluster.resources import worker_resources

Work = Callable[[int], Part]
"""From a part's number to the part."""

# A handful of bad samples at the start of a run says little about the share of them in all.
_SAMPLES_BEFORE_JUDGING = 1000
# Ray Data holds every block's input from the start. With more parts than this, a block is several.
_MOST_BLOCKS = 2000


def start(folder: PartitionedOutput, workers: WorkersConfig) -> dict[str, Any] | None:
    """Make the output and the cluster ready; the summary of an output that is complete already, for which nothing is.

    Raises UserError for an output that holds something else, and a cluster without room for the workers.
    """
    folder.check()
    complete = folder.read_summary()
    if complete is not None:
        ProgressLine(complete["samples"]).note(f"'{folder.path}' is complete already")
        return complete
    connect_for(workers)
    folder.begin()
    return None


def connect_for(workers: WorkersConfig) -> None:
    """Join or start Ray. Raises UserError for a cluster without room for the workers."""
    connect(local_cpus=int(workers.num_workers * workers.cpus_per_worker))
    check_resources([worker_resources(workers)] * workers.num_workers, f"a job with {workers.num_workers} workers")


def run_parts(
    folder: PartitionedOutput,
    make: Callable[[], Work],
    workers: WorkersConfig,
    total_samples: int,
    max_bad_fraction: float,
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
    for _, done in run_jobs([OutputJob(folder, make)], workers, [(0, part) for part in missing]):
        tally = add([tally, done.tally])
        busy_s += done.seconds
        progress.update(tally["rows"]["samples"], bad=format_causes(tally) or "0")
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


class OutputJob(NamedTuple):
    """An output, and what makes its parts: `make` is called in each worker that does some of them."""

    folder: PartitionedOutput
    make: Callable[[], Work]


class Done(NamedTuple):
    """A part that lies there."""

    tally: Tally
    seconds: float


def run_jobs(
    jobs: Sequence[OutputJob], workers: WorkersConfig, parts: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, Done]]:
    """Do parts, each (job, number), somewhere in the cluster, all by one pool; (job, result) come as they are ready.

    Raises the UserError of a worker.
    """
    if not parts:
        return
    rows = [{"job": job, "part": part} for job, part in parts]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS)).map(
        _PoolActor,  # type: ignore[arg-type]
        fn_constructor_args=(jobs, max(1, int(workers.cpus_per_worker))),
        compute=ray.data.ActorPoolStrategy(size=min(workers.num_workers, len(parts))),
        num_cpus=workers.cpus_per_worker,
        num_gpus=int(workers.use_gpu),
    )
    results = iter(dataset.iter_rows())
    with silent_stderr():
        first = next(results)
    for row in chain([first], results):
        done = pickle.loads(row["done"])
        if isinstance(done, UserError):
            raise done
        yield int(row["job"]), done


class _PoolActor:
    """An actor of the pool. A UserError comes back as a result; Ray would wrap it in a traceback."""

    def __init__(self, jobs: Sequence[OutputJob], threads: int) -> None:
        torch.set_num_threads(threads)
        self._jobs = jobs
        self._working: tuple[int, Work] | None = None

    def __call__(self, row: dict[str, np.generic]) -> dict[str, Any]:
        job = int(row["job"])
        try:
            return {"job": job, "done": pickle.dumps(self._do(job, int(row["part"])))}
        except UserError as error:
            return {"job": job, "done": pickle.dumps(error)}

    def _do(self, job: int, number: int) -> Done:
        folder = self._jobs[job].folder
        # A worker that was lost may have come as far as writing it.
        tally = folder.tally(number)
        if tally is not None:
            return Done(tally, 0.0)
        work = self._work_of(job)
        started = time.monotonic()
        folder.note_attempt(number)
        part = work(number)
        folder.write(number, part)
        return Done(part.tally, time.monotonic() - started)

    def _work_of(self, job: int) -> Work:
        """What does the job's parts; that of another job is let go."""
        if self._working is None or self._working[0] != job:
            self._working = None
            self._working = job, self._jobs[job].make()
        return self._working[1]
