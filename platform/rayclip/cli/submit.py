"""Run a command on a Ray cluster, and follow it; also list, status, logs and stop."""

import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rayclip.cli.command import Command, Settings, print_help, print_table, take_option
from rayclip.cli.main import JOBS, get_command
from rayclip.config.recipes import find_config, list_recipes
from rayclip.errors import UserError, nearest
from rayclip.version import code_version

if TYPE_CHECKING:
    from rayclip.orchestration.cluster.submission import Cluster

_USAGE = """usage: rayclip submit COMMAND CONFIG key=value ... [--detach]    run a command on the cluster, and follow it
       rayclip submit list                                      every job, the last first
       rayclip submit status ID | logs ID | stop ID             look at one; follow it; stop it

  --address http://HEAD:8265  the cluster, or RAY_API_SERVER_ADDRESS in the environment
  RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH in the environment, where the cluster asks for it
  The package, the config and the files of this folder that it names travel with the job.
  ctrl-c leaves the job running; the exit code is the job's"""


def command(arguments: list[str]) -> int:
    """Submit a job, or show and stop those that are there; the exit code. Raises UserError."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print_help(_USAGE)
        return 0 if arguments else 2
    arguments, address = take_option(arguments, "--address")
    first, rest = (arguments or [""])[0], arguments[1:]
    if first in ("list", "status", "logs", "stop"):
        return show(address, first, rest)
    detach, rest = "--detach" in rest, [argument for argument in rest if argument != "--detach"]
    return submit(address, first, rest, detach)


def show(address: str | None, what: str, rest: list[str]) -> int:
    """List jobs, print the status of one, follow its log, or stop it. Raises UserError."""
    if len(rest) != (what != "list"):
        raise UserError(f"{what} takes {'no' if what == 'list' else 'one'} ID; list shows them")

    from rayclip.orchestration.cluster.submission import Cluster

    cluster = Cluster(address)
    if what == "logs":
        return follow(cluster, rest[0])
    if what == "stop":
        print(f"{rest[0]} {cluster.stop(rest[0]).lower()}")
        return 0
    jobs = cluster.jobs() if what == "list" else [cluster.info(rest[0])]
    print_table(
        [(str(job.submission_id), f"{job.status.lower():<9}  {job.entrypoint}") for job in jobs] or [("no jobs", "")]
    )
    return 0


def submit(address: str | None, job: str, arguments: list[str], detach: bool) -> int:
    """Check, ship and start a job; follow it unless detached. Raises UserError with all that is wrong."""
    settings = read_settings(job, arguments)

    from rayclip.orchestration.cluster.runtime_env import check_paths, local_inputs, pack

    with tempfile.TemporaryDirectory() as folder:
        shipped = ship_config(job, arguments, Path(folder))
        inputs = local_inputs(settings.config, Path.cwd())
        _copy(inputs, Path(folder))
        problems, shared = check_paths(settings.config, settings.summary, inputs, Path.cwd())
        cluster, more = _check_cluster(address, settings)
        if cluster is None or problems or more:
            raise _all_in_one([*problems, *more])
        for line in (cluster.skew(), f"every node must have {', '.join(shared)}" if shared else None):
            if line:
                print(f"note: {line}", file=sys.stderr)
        shipment = pack(Path(folder))
        name = getattr(settings.config, "name", None) or Path(arguments[0]).stem
        job_id = cluster.submit(job, name, shipped, shipment, code_version())
    files = f"{shipment.num_files:,} files, {shipment.num_bytes / 1e6:.1f} MB"
    print(f"submitted {job_id}, with {files}", file=sys.stderr)
    if not detach:
        return follow(cluster, job_id)
    print(job_id)
    return 0


def read_settings(job: str, arguments: list[str]) -> Settings:
    """Return what the command itself makes of its arguments. Raises its own UserError."""
    return _job_command(job).parse(arguments)


def ship_config(job: str, arguments: list[str], folder: Path) -> list[str]:
    """Copy a config of the caller's own into the job's folder; returns the arguments that find it there.

    A recipe's name stays: the package travels too.
    """
    index = _job_command(job).config_index
    if index is None or arguments[index] in list_recipes():
        return arguments
    given = find_config(arguments[index])
    (folder / given.name).write_bytes(given.read_bytes())
    return [*arguments[:index], given.name, *arguments[index + 1 :]]


def follow(cluster: "Cluster", job_id: str) -> int:
    """Show a job's output until it ends; ctrl-c leaves it running. Returns its exit code."""
    try:
        return cluster.follow(job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\n{job_id} runs on; rayclip submit logs|status|stop {job_id}", file=sys.stderr)
        return 130


def _job_command(job: str) -> Command:
    if job not in JOBS:
        raise UserError(f"no command '{job}' to submit: {nearest(job, list(JOBS))}")
    found = get_command(job)
    assert isinstance(found, Command)
    return found


def _copy(names: Iterable[str], folder: Path) -> None:
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)


def _check_cluster(address: str | None, settings: Settings) -> tuple["Cluster | None", list[str]]:
    """The cluster, and why it cannot be asked or could never place the job."""
    from rayclip.orchestration.cluster.resources import resource_request, shortage
    from rayclip.orchestration.cluster.runtime_env import check_caches
    from rayclip.orchestration.cluster.submission import Cluster

    try:
        cluster = Cluster(address)
        capacity = cluster.capacity()
    except UserError as error:
        return None, [str(error)]
    missing = shortage(resource_request(settings.config), capacity)
    problems = [f"the cluster at {cluster.address} cannot place this job: {missing}"] if missing else []
    return cluster, [*problems, *(check_caches(settings.config) if len(capacity.nodes) > 1 else [])]


def _all_in_one(problems: list[str]) -> UserError:
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError("\n  ".join([f"this cannot be submitted, for {len(problems)} reasons:", *problems]))
