"""Starting the service from one process: a Ray of its own, or the cluster that RAY_ADDRESS names."""

import atexit
import importlib.util
import io
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from contextlib import redirect_stdout
from pathlib import Path

from rayclip.errors import UserError
from rayclip.orchestration.cluster.ray_internals import (
    HAPROXY_MODULE,
    SERVE_ENVIRONMENT,
    blocking_handle,
    haproxy_environment,
    serve_logs,
    write_haproxy_starter,
)
from rayclip.serve.config import ServeConfig
from rayclip.serve.stopping import ProblemReporter, StopRequestedError, StopSignals, drain

APP = "rayclip"
_PORTS = 200
_AT_ONCE_S = 2.0
_STARTING_S = 5.0
HEADER_TIMEOUT_S = 10
"""Longest that a request's headers may take."""


def set_environment() -> None:
    """Set what is not set yet, before anything imports ray.serve; say what a proxy that is not ours leaves out."""
    if importlib.util.find_spec(HAPROXY_MODULE) is None:  # not on this platform: Serve's own proxy, slower
        _say_what_is_left_out("without HAProxy")
        return
    os.environ.update(SERVE_ENVIRONMENT | os.environ)
    if os.environ.get("RAY_ADDRESS"):
        _say_what_is_left_out("on a cluster that is joined")
    else:
        _set_local_haproxy()


def _say_what_is_left_out(where: str) -> None:
    print(
        f"note: {where} the service sets no time limit for a request's headers ({HEADER_TIMEOUT_S} s elsewhere), and "
        "what comes before it has started gets the proxy's own answer, not 503: have the balancer before it do both",
        file=sys.stderr,
    )


def _set_local_haproxy() -> None:
    """Files and ports of its own, so that two services fit on one machine."""
    from rayclip.serve.schemas import Error, ErrorResponse

    # Short: HAProxy appends 70 characters to it, and a socket has a path of at most 97.
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    first = random.SystemRandom().randrange(10_000, 32_000, _PORTS)
    not_yet = ErrorResponse(error=Error(message="the service is starting", type="server_error", code="loading"))
    write_haproxy_starter(
        folder, HEADER_TIMEOUT_S, not_yet.model_dump_json()
    )  # before the environment says that this is HAProxy
    os.environ.update(haproxy_environment(folder, _free_port, range(first, first + _PORTS)) | os.environ)


def check(config: ServeConfig) -> str:
    """What can be known to be wrong before anything starts. Returns the version to be served. Raises UserError."""
    # Here and below: imports that take seconds, or that must not come before the environment is set.
    from rayclip.inference.prompts import resolve_templates
    from rayclip.serve.fetch import UrlFetcher
    from rayclip.serve.middleware.auth import ApiKeys, require_keys
    from rayclip.tracking.registry import resolve_model
    from rayclip.training.checkpoint import load_model

    for templates in (config.templates, *(label_set.templates for label_set in config.label_sets.values())):
        if templates is not None:
            resolve_templates(templates)
    UrlFetcher(config.urls)
    require_keys(config.host, config.auth, ApiKeys.load(config.auth, os.environ))
    _check_port(config)
    sources = [resolve_model(uri, config.tracking_uri) for uri in (config.model, config.canary) if uri]
    for source in sources:
        load_model(source.folder)
    return sources[0].version


def run(config: ServeConfig, version: str) -> int:
    """Serve until SIGINT or SIGTERM, and answer what was accepted; the exit code, 130 or 143. Raises UserError.

    A second signal ends it at once.
    """
    signals = StopSignals()
    signals.install()
    try:
        print(f"starting {version} ...", file=sys.stderr, flush=True)
        start(config, signals)
        address = f"http://{'[' + config.host + ']' if ':' in config.host else config.host}:{config.port}"
        print(
            f"{version} answers at {address}  (a page to try it; {address}/docs for the API; ctrl-c stops)", flush=True
        )
        signals.wait(ProblemReporter(blocking_handle("Coordinator", APP)))
        _finish(config, signals, config.request_timeout_s)
    except (StopRequestedError, SystemExit):  # while it starts; the second is what Ray's own handler of SIGTERM raises
        signals.number = signals.number or signal.SIGTERM
        _finish(config, signals, _STARTING_S)  # it may answer already, before it is known here
    finally:
        stop(at_once=signals.again.is_set())
    return signals.exit_code


def _finish(config: ServeConfig, signals: StopSignals, patience_s: float) -> None:
    """Have what was accepted answered, where the service has come so far that it accepts anything."""
    import ray

    print("stopping: what was accepted is answered; again to stop at once", file=sys.stderr, flush=True)
    if not ray.is_initialized():
        return
    try:
        coordinator = blocking_handle("Coordinator", APP)
    except Exception as error:
        print(f"there is nothing to finish yet: {type(error).__name__}", file=sys.stderr)
        return
    if not drain(config, coordinator, signals.again, patience_s):
        print("stopped before it was known that every request was answered", file=sys.stderr)


def start(config: ServeConfig, signals: StopSignals) -> None:
    """Start the service and return once it answers. Raises UserError."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from rayclip.orchestration.cluster.connection import connect
    from rayclip.serve.app import bind

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.serve")  # it overlooks the environment
    connect(local_cpus=_cpus(config), lean=False)
    signals.install()
    serve.start(
        http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=config.request_timeout_s + 5),
        logging_config={"enable_access_log": False},
    )
    try:
        serve.run(bind(config), name=APP, route_prefix="/")
    except RuntimeError:
        found = [d.message for d in serve.status().applications[APP].deployments.values() if d.message]
        reason = _reason("\n".join(found))
        raise UserError(f"the service did not start: {reason}; its logs are in {serve_logs()}") from None


def stop(at_once: bool = False) -> None:
    """Stop the service, and the Ray that was started for it; `at_once`: without waiting for replicas to end."""
    import ray
    from ray import serve

    # What Ray says meanwhile of actors that it kills itself goes to its logs too.
    with redirect_stdout(io.StringIO()):
        if ray.is_initialized():  # Serve would start Ray to find out that it has nothing to shut down
            ending = threading.Thread(target=serve.shutdown, daemon=True)
            ending.start()
            ending.join(_AT_ONCE_S if at_once else None)  # HAProxy is the first to go
        ray.shutdown()


def _cpus(config: ServeConfig) -> int:
    """Logical cores that a Ray of our own needs for every replica at its most."""
    parts = (config.ingress, config.image_encoder, config.text_encoder)
    return int(sum(part.num_cpus * part.max_replicas for part in parts) + 1)


def _check_port(config: ServeConfig) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
    except OSError as error:
        raise UserError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _reason(message: str) -> str:
    """The last line of a traceback that says what was raised."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    raised = [line for line in lines if "Error" in line.partition(":")[0]]
    return (raised or lines or ["unknown"])[-1].rpartition("UserError: ")[2]
