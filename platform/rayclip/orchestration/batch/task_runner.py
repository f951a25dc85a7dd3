"""Run tasks on a pool of actors over the cluster, each with its state at hand, one task at a time.

The driver hands an actor its next task when it has done the last, so that what was being done when a worker was lost is
known: the task is done by another, and a worker takes the lost one's place. Ray restarts nothing by itself here.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from rayclip.config import WorkersConfig
from rayclip.errors import UserError
from rayclip.orchestration.cluster.connection import check_resources, cluster_capacity, connect
from rayclip.orchestration.cluster.resources import worker_resources

Task = TypeVar("Task")
Result = TypeVar("Result")

_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)
_MOST_LOSSES = 3


def connect_for(workers: WorkersConfig) -> None:
    """Join or start Ray. Raises UserError for a cluster without room for the workers."""
    connect(local_cpus=int(workers.num_workers * workers.cpus_per_worker))
    check_resources([worker_resources(workers)] * workers.num_workers, f"a job with {workers.num_workers} workers")


def run_tasks(
    tasks: Sequence[Task],
    make: Callable[[], Callable[[Task], Result]],
    workers: WorkersConfig | None = None,
    name: Callable[[Task], str] = repr,
) -> Iterator[Result]:
    """Yield the results of tasks as they are ready; Ray is joined or started where there is anything to do.

    `make` is called once in each worker, for the function that does the tasks. Without `workers` there is one for each
    CPU that the cluster has or may grow to, and a single task is done here. `name` names a task in errors. Raises the
    UserError of a worker as it is, and one where a task has cost several workers their lives.
    """
    if not tasks:
        return
    if workers is None and len(tasks) == 1:
        yield make()(tasks[0])
        return
    if workers is None:
        connect()
        size, resources = int(cluster_capacity().get("CPU", 1)), {"CPU": 1.0}
    else:
        connect_for(workers)
        size, resources = workers.num_workers, worker_resources(workers)
    advice = ": lower batch_size, or cluster.num_workers" if workers else ""
    pool = _Pool(make, max(1, min(size, len(tasks))), resources, advice)
    try:
        yield from pool.run(tasks, name)
    finally:
        pool.close()


class _TaskWorker:
    """An actor of the pool. A UserError comes back as a result; Ray would wrap it in a traceback."""

    def start(self, make: Callable[[], Callable[[Any], Any]]) -> UserError | None:
        try:
            self._work = make()
        except UserError as error:
            return error
        return None

    def do(self, task: Any) -> Any:
        try:
            return self._work(task)
        except UserError as error:
            return error


class _Pool:
    """The actors, and what each is doing: a task, by its index, or starting (None)."""

    def __init__(
        self, make: Callable[[], Callable[[Any], Any]], size: int, resources: dict[str, float], advice: str
    ) -> None:
        self._actor: Any = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(_TaskWorker)
        self._make = ray.put(make)
        self._size, self._advice = size, advice
        self._running: dict[ray.ObjectRef, tuple[Any, int | None]] = {}
        self._losses: Counter[int | None] = Counter()
        for _ in range(size):
            self._start_worker()

    def run(self, tasks: Sequence[Task], name: Callable[[Task], str]) -> Iterator[Any]:
        left, num_done = deque(range(len(tasks))), 0
        while num_done < len(tasks):
            (ref,), _ = ray.wait(list(self._running), num_returns=1)
            actor, index = self._running.pop(ref)
            try:
                result = ray.get(ref)
            except RayTaskError:  # a defect
                raise
            except _LOST:
                ray.kill(actor)
                self._count_loss(index, "as they started" if index is None else f"with {name(tasks[index])}")
                if index is not None:
                    left.appendleft(index)
                self._start_worker()
                continue
            if isinstance(result, UserError):
                raise result
            self._losses.pop(index, None)
            if left:
                following = left.popleft()
                self._running[actor.do.remote(tasks[following])] = actor, following
            else:
                ray.kill(actor)
            if index is not None:
                num_done += 1
                yield result

    def close(self) -> None:
        """End the actors with what they are doing."""
        for actor, _ in self._running.values():
            ray.kill(actor)

    def _start_worker(self) -> None:
        actor = self._actor.remote()
        self._running[actor.start.remote(self._make)] = actor, None

    def _count_loss(self, index: int | None, when: str) -> None:
        self._losses[index] += 1
        # A node that goes takes many workers with it that start.
        if self._losses[index] >= _MOST_LOSSES * (self._size if index is None else 1):
            raise UserError(
                f"{self._losses[index]} workers in a row were lost {when}, most likely for lack of memory{self._advice}"
            )
