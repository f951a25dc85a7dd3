"""Outputs written part by part by the cluster, with progress and a limit on bad samples."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from rayclip.config import WorkersConfig
from rayclip.orchestration.batch.partitioned_output import (
    PartitionedOutput,
    Tally,
    add,
    check_bad,
    format_causes,
)
from rayclip.orchestration.batch.task_runner import connect_for, run_tasks
from rayclip.orchestration.cluster.progress import ProgressLine

Work = Callable[[Any], Any]
"""From a part's number, or the input that the job has for it, to what the output writes, which has a tally."""

# A handful of bad samples at the start of a run says little about the share of them in all.
_SAMPLES_BEFORE_JUDGING = 1000


class OutputJob(NamedTuple):
    """An output, and what makes its parts: `make` is called in each worker that does some of them."""

    output: PartitionedOutput
    make: Callable[[], Work]
    inputs: Sequence[Any] | None = None
    """What each part is made from, where its number does not say it. It is sent with the part alone."""


class PartResult(NamedTuple):
    """A part that was written: its counts, and how long that took."""

    tally: Tally
    seconds: float


class _PartTask(NamedTuple):
    job: int
    part: int
    input: Any


def complete_output(
    output: PartitionedOutput, workers: WorkersConfig | None, write: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the summary of an output: of one that is complete already, or what `write` returns, which completes it.

    Raises UserError for an output that holds something else, and a cluster without room for the workers.
    """
    output.check()
    complete = output.read_summary()
    if complete is not None:
        ProgressLine(0).note(f"'{output.path}' is complete already")
        return complete
    if workers is not None:
        connect_for(workers)
    with output.writing():
        return write()


def run_parts(
    output: PartitionedOutput,
    make: Callable[[], Work],
    workers: WorkersConfig,
    total_samples: int,
    max_bad_fraction: float,
) -> dict[str, Any]:
    """Write the parts that are missing, complete the output with its summary, and return that.

    Raises the UserError of a worker, and one where more samples have an error than is allowed.
    """
    started = time.monotonic()
    tally, num_new, rate = write_missing(OutputJob(output, make), workers, total_samples, max_bad_fraction)
    summary = {
        "output": str(output.path),
        "model_version": output.identity.get("model_version"),
        "source": output.identity["source"],
        **tally.pop("rows"),
        **tally,
        "parts": output.num_parts,
        "new_samples": num_new,
        "time_s": round(time.monotonic() - started, 1),
        "samples_per_s": rate,
    }
    return output.finish(summary)


def write_missing(
    job: OutputJob, workers: WorkersConfig | None, total_samples: int, max_bad_fraction: float
) -> tuple[Tally, int, float]:
    """Write the parts that are missing; return the counts of all parts, the number of new samples, and samples/s.

    The rate is that of workers at work: the time in which they start and load their model is not in it. Raises as
    `run_parts` does.
    """
    output = job.output
    missing, tally = output.missing()
    num_before = tally["rows"]["samples"]
    progress = ProgressLine(total_samples, start=num_before)
    if num_before:
        progress.note(f"going on with '{output.path}': {output.num_parts - len(missing):,} parts are there")
    busy_s = 0.0
    for _, result in run_jobs([job], workers, [(0, part) for part in missing]):
        tally = add([tally, result.tally])
        busy_s += result.seconds
        progress.update(tally["rows"]["samples"], bad=format_causes(tally) or "0")
        if tally["rows"]["samples"] >= _SAMPLES_BEFORE_JUDGING:
            check_bad(tally, max_bad_fraction, output.first_bad)
    progress.close()
    check_bad(tally, max_bad_fraction, output.first_bad)
    num_new = tally["rows"]["samples"] - num_before
    num_busy = min(workers.num_workers if workers else 1, len(missing))
    return tally, num_new, round(num_new / busy_s * num_busy, 1) if busy_s else 0.0


def run_jobs(
    jobs: Sequence[OutputJob], workers: WorkersConfig | None, parts: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, PartResult]]:
    """Write parts, each (job, number), all by one pool; yield (job, result) as they are ready.

    Raises the UserError of a worker.
    """

    def task(job: int, part: int) -> _PartTask:
        inputs = jobs[job].inputs
        return _PartTask(job, part, part if inputs is None else inputs[part])

    threads = max(1, int(workers.cpus_per_worker)) if workers else 1
    makers = [(job.output, job.make) for job in jobs]
    return run_tasks(
        [task(*part) for part in parts],
        partial(_PartWriter, makers, threads),
        workers,
        name=lambda task: f"part {task.part}",
    )


class _PartWriter:
    """Writes parts in a worker, with what it has made for the job that it does at the time."""

    def __init__(self, jobs: Sequence[tuple[PartitionedOutput, Callable[[], Work]]], threads: int) -> None:
        self._jobs, self._threads = jobs, threads
        self._working: tuple[int, Work] | None = None

    def __call__(self, task: _PartTask) -> tuple[int, PartResult]:
        output = self._jobs[task.job][0]
        # A worker that was lost may have come as far as writing it.
        tally = output.tally(task.part)
        if tally is not None:
            return task.job, PartResult(tally, 0.0)
        work = self._work_of(task.job)
        started = time.monotonic()
        content = work(task.input)
        output.write(task.part, content)
        return task.job, PartResult(content.tally, time.monotonic() - started)

    def _work_of(self, job: int) -> Work:
        """What does the job's parts; that of another job is let go."""
        if self._working is None or self._working[0] != job:
            self._working = None
            self._working = job, self._jobs[job][1]()
            # Who has no model does not pay for the import.
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(self._threads)
        return self._working[1]
