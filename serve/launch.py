"""Starting the service from one process: a Ray of its own, or the cluster that RAY_ADDRESS names."""

import atexit
import importlib.util
import io
import logging
import os
import random
import shutil
import socket
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

from rayclip.errors import UserError
from rayclip.orchestration.cluster.ray_internals import (
    HAPROXY_MODULE,
    SERVE_ENVIRONMENT,
    haproxy_environment,
    serve_logs,
)
from rayclip.serve.config import ServeConfig

APP = "rayclip"
_PORTS = 200


def set_environment() -> None:
    """Set what is not set yet, before anything imports ray.serve."""
    if importlib.util.find_spec(HAPROXY_MODULE) is None:  # not on this platform: Serve's own proxy, slower
        return
    os.environ.update(SERVE_ENVIRONMENT | os.environ)
    if not os.environ.get("RAY_ADDRESS"):
        _set_local_haproxy()


def _set_local_haproxy() -> None:
    """Files and ports of its own, so that two services fit on one machine."""
    # Short: HAProxy appends 70 characters to it, and a socket has a path of at most 97.
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    first = random.SystemRandom().randrange(10_000, 32_000, _PORTS)
    os.environ.update(haproxy_environment(folder, _free_port, range(first, first + _PORTS)) | os.environ)


def check(config: ServeConfig) -> str:
    """What can be known to be wrong before anything starts. Returns the version to be served. Raises UserError."""
    # Here and below: imports that take seconds, or that must not come before the environment is set.
    from rayclip.inference.prompts import resolve_templates
    from rayclip.serve.fetch import UrlFetcher
    from rayclip.serve.middleware.auth import ApiKeys, require_keys
    from rayclip.tracking.registry import resolve_model
    from rayclip.training.checkpoint import load_model

    resolve_templates(config.templates)
    for label_set in config.label_sets.values():
        resolve_templates(label_set.templates or config.templates)
    UrlFetcher(config.urls)
    require_keys(config.host, config.auth, ApiKeys.load(config.auth, os.environ))
    _check_port(config)
    sources = [resolve_model(uri, config.tracking_uri) for uri in (config.model, config.canary) if uri]
    for source in sources:
        load_model(source.folder)
    return sources[0].version


def start(config: ServeConfig) -> None:
    """Start the service and return once it answers. Raises UserError."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from rayclip.orchestration.cluster.connection import connect
    from rayclip.serve.app import bind

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.serve")  # it overlooks the environment
    connect(local_cpus=_cpus(config))
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


def stop() -> None:
    """Stop the service, and the Ray that was started for it."""
    import ray
    from ray import serve

    # What Ray says meanwhile of actors that it kills itself goes to its logs too.
    with redirect_stdout(io.StringIO()):
        serve.shutdown()
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
