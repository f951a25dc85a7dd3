"""Outputs written part by part by the cluster, with progress and a limit on bad samples."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from rayclip.config import WorkersConfig
from rayclip.io.paths import StoragePath
from rayclip.orchestration.batch.partitioned_output import (
    PartitionedOutput,
    Tally,
    add,
    check_bad,
    format_causes,
)
from rayclip.orchestration.batch.task_runner import connect_for, run_tasks
from rayclip.orchestration.cluster.progress import ProgressLine, note

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
        note(f"'{output.path}' is complete already")
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
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the summary of an output: of one that is complete already, or of all parts once the missing are written.

    `prepare` is called before the first part is made. Raises UserError as `complete_output` does, the UserError of a
    worker, and one where more samples have an error than is allowed.
    """

    def write() -> dict[str, Any]:
        prepare()
        started = time.monotonic()
        tally, num_new, rate = write_missing([OutputJob(output, make)], workers, total_samples, max_bad_fraction)
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

    return complete_output(output, workers, write)


def write_missing(
    jobs: Sequence[OutputJob], workers: WorkersConfig | None, total_samples: int, max_bad_fraction: float
) -> tuple[Tally, int, float]:
    """Write the parts that are missing of some outputs, with one pool of workers.

    Returns the counts of all parts, the number of new samples, and samples/s while workers are at work: the time in
    which they start and load their model is not in it. Raises as `run_parts` does.
    """
    parts: list[tuple[int, int]] = []
    tally = add(())
    for number, (output, _, _) in enumerate(jobs):
        missing, there = output.missing()
        parts += [(number, part) for part in missing]
        tally = add([tally, there])
        if there["rows"]["samples"]:
            note(f"going on with '{output.path}': {output.num_parts - len(missing):,} parts are there")
    num_before = tally["rows"]["samples"]
    progress = ProgressLine(total_samples, start=num_before)
    busy_s = 0.0
    for result in run_jobs(jobs, workers, parts):
        tally = add([tally, result.tally])
        busy_s += result.seconds
        progress.update(tally["rows"]["samples"], bad=format_causes(tally) or "0")
        if tally["rows"]["samples"] >= _SAMPLES_BEFORE_JUDGING:
            _check_bad(tally, max_bad_fraction, jobs)
    progress.close()
    _check_bad(tally, max_bad_fraction, jobs)
    num_new = tally["rows"]["samples"] - num_before
    num_busy = min(workers.num_workers if workers else 1, len(parts))
    return tally, num_new, round(num_new / busy_s * num_busy, 1) if busy_s else 0.0


def _check_bad(tally: Tally, max_bad_fraction: float, jobs: Sequence[OutputJob]) -> None:
    check_bad(tally, max_bad_fraction, lambda: next(filter(None, (job.output.first_bad() for job in jobs)), None))


def run_jobs(
    jobs: Sequence[OutputJob], workers: WorkersConfig | None, parts: Sequence[tuple[int, int]]
) -> Iterator[PartResult]:
    """Write parts, each (job, number), all by one pool of workers; yield what is written as it is ready.

    Raises the UserError of a worker, and one where a host with a worker has another folder at an output's path.
    """
    threads = max(1, int(workers.cpus_per_worker)) if workers else 1
    inputs = [job.inputs for job in jobs]
    tasks = [_PartTask(job, part, part if (given := inputs[job]) is None else given[part]) for job, part in parts]
    makers = [(job.output, job.make) for job in jobs]
    with ExitStack() as marked:
        marks = {job: marked.enter_context(jobs[job].output.marked()) for job in {job for job, _ in parts}}
        work = partial(_PartWriter, makers, marks, threads)
        yield from run_tasks(tasks, work, workers, name=lambda task: f"part {task.part}")


class _PartWriter:
    """Writes parts in a worker, with what it has made for the job that it does at the time."""

    def __init__(
        self,
        jobs: Sequence[tuple[PartitionedOutput, Callable[[], Work]]],
        marks: Mapping[int, StoragePath],
        threads: int,
    ) -> None:
        self._jobs, self._unchecked, self._threads = jobs, dict(marks), threads
        self._working: tuple[int, Work] | None = None

    def __call__(self, task: _PartTask) -> PartResult:
        output = self._jobs[task.job][0]
        if task.job in self._unchecked:
            output.check_marker(self._unchecked.pop(task.job))
        # A worker that was lost may have come as far as writing it.
        tally = output.tally(task.part)
        if tally is not None:
            return PartResult(tally, 0.0)
        work = self._work_of(task.job)
        started = time.monotonic()
        content = work(task.input)
        output.write(task.part, content)
        return PartResult(content.tally, time.monotonic() - started)

    def _work_of(self, job: int) -> Work:
        """What does the job's parts; that of another job is let go."""
        if self._working is None or self._working[0] != job:
            self._working = None
            self._working = job, self._jobs[job][1]()
            # Who has no model does not pay for the import.
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(self._threads)
        return self._working[1]
