"""Starting Ray, or joining it, without noise; and asking what it has before something waits for it forever."""

import logging
import os
import signal
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import ray

from rayclip.errors import UserError
from rayclip.io import read_only
from rayclip.orchestration.cluster.progress import note
from rayclip.orchestration.cluster.ray_internals import (
    LOCAL_ENVIRONMENT,
    few_processes,
    is_submitted_job,
    quieten,
    start_early,
)
from rayclip.orchestration.cluster.resources import Bundle, format_resources, most_of, num_times_placed, total

_LEAST_LOGICAL_CPUS = 4  # two workers, a reader, and one to spare
_S3_NAMES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "MLFLOW_S3_ENDPOINT_URL")
_STORAGE_NAMES = (*_S3_NAMES, *read_only.ENVIRONMENT)
_SOURCE = Path(__file__).resolve().parents[3]
"""The folder that holds the package: a checkout's platform/, or the site-packages that it is installed in."""


class _Start(threading.Thread):
    """Joins or starts Ray beside whatever else has to be imported and checked.

    It stays: Linux ends Ray's processes with the thread that has started them, as if with the process.
    """

    def __init__(self, local_cpus: int, num_processes: int, module: str) -> None:
        super().__init__(daemon=True, name="start-ray")
        self._local_cpus, self._num_processes, self._module = local_cpus, num_processes, module
        self._error: BaseException | None = None
        self._done = threading.Event()

    def run(self) -> None:
        """Start Ray, and keep the thread."""
        try:
            _start(self._local_cpus, num_processes=self._num_processes)
        except BaseException as error:
            self._error = error
        self._done.set()
        if self._error is None and _owned:
            with suppress(Exception):  # Ray may be ending, after a mistake; what is missing starts when it is asked for
                self._early = start_early(self._module)
        threading.Event().wait()

    def is_done(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._done.is_set()

    def wait(self) -> None:
        """Return when Ray is up. Raises what went wrong."""
        self._done.wait()
        if self._error is not None:
            raise self._error


_starting: _Start | None = None
_owned = False


def begin_connecting(local_cpus: int, num_processes: int, module: str) -> None:
    """Begin what `connect` does, in the background: Ray's processes start while this one imports the rest.

    A Ray of our own is going to have `num_processes`, all of which start now, and its first task imports `module`.
    Nothing is said of it: a mistake that is found meanwhile is one line, and Ray ends with the process.
    """
    global _starting
    if _starting is None and not ray.is_initialized():
        _starting = _Start(local_cpus, num_processes, module)
        _starting.start()


def connect(local_cpus: int = 0, lean: bool = True) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; do nothing where that is done.

    A Ray of our own gets `local_cpus` logical cores where that is within reason: workers that wait for each other must
    all be placed, also on a laptop with fewer cores. Ray's own messages go to its log files. It is `lean` where nothing
    asks for Ray's metrics: it starts seconds earlier.
    """
    global _starting
    starting, _starting = _starting, None
    if starting is not None:
        if not starting.is_done():
            note(_joining())
        starting.wait()
    if not ray.is_initialized():
        note(_joining())
        with _own_signal_handlers():
            _start(local_cpus, lean)
    _quieten()


def _joining() -> str:
    return "joining the Ray cluster ..." if os.environ.get("RAY_ADDRESS") else "starting Ray ..."


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the process's handling of SIGTERM: Ray puts its own there, which exits with code 15 and saves nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def owns_ray() -> bool:
    """Return whether this process started Ray: it ends with the process, and all its processes share an environment."""
    return _owned and ray.is_initialized()


def _start(local_cpus: int, lean: bool = True, num_processes: int = 0) -> None:
    global _owned
    quieten()
    _owned = not os.environ.get("RAY_ADDRESS")
    if os.environ.get("RAY_ADDRESS"):
        # A submitted job's processes have its environment already.
        environment = None if is_submitted_job() else {"env_vars": storage_environment()}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
        return
    cores = os.cpu_count() or 1
    with _environment(_worker_environment()), few_processes(num_processes) if lean else nullcontext():
        ray.init(
            address="local",
            num_cpus=max(cores, min(local_cpus, max(_LEAST_LOGICAL_CPUS, 2 * cores))),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def disconnect() -> None:
    """Leave the cluster, or end the Ray that `connect` started; the next job starts one with what it needs."""
    ray.shutdown()


def check_resources(bundles: list[Bundle], what: str) -> None:
    """Raise UserError where the cluster could never have what the bundles come to, however far it grows."""
    needed = {name: amount for name, amount in total(bundles).items() if amount}
    capacity = cluster_capacity()
    if any(capacity.get(name, 0) < amount for name, amount in needed.items()):
        has = ray.cluster_resources()
        holds = format_resources({name: has.get(name, 0) for name in needed})
        raise UserError(f"{what} needs {format_resources(needed)}; the cluster has {holds} in all")


def cluster_capacity() -> Bundle:
    """Return the resources that the cluster has in all, or may grow to where it says so."""
    most = most_of([node["Labels"] for node in ray.nodes() if node["Alive"]])
    has = ray.cluster_resources()
    return {name: max(has.get(name, 0), most.get(name, 0)) for name in {*has, *most}}


def storage_environment() -> dict[str, str]:
    """Where S3 and other stores are, as this process is told: what workers of a cluster that was joined are told too.

    Credentials are not in it: who may look at the cluster's jobs sees their environment. Each node has its own, from
    its machine's role, a mounted secret or a profile.
    """
    return {name: os.environ[name] for name in _STORAGE_NAMES if name in os.environ}


def num_that_fit(bundles: list[Bundle]) -> int:
    """How many times the cluster, with nothing else on it, could place all of these together; each on one node."""
    return num_times_placed(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]])


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The environment that a Ray of our own inherits: what asks for none of its own gets a process that waits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _worker_environment() -> dict[str, str]:
    # Workers import the package from where this process has it. Site-packages they have anyway, and in their own place:
    # on PYTHONPATH it would come before the standard library.
    installed = str(_SOURCE) in map(sysconfig.get_path, ("purelib", "platlib"))
    paths = [] if installed else [str(_SOURCE)]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")])),
        **LOCAL_ENVIRONMENT,
    }


def _quieten() -> None:
    from ray.data import DataContext  # workers do without; it sets log levels as it is imported, hence first

    quieten()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
