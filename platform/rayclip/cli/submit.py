"""Run a command on a Ray cluster, and follow it; also list, status, logs and stop."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import rayclip.config
from rayclip.cli.command import print_help, print_table, take_option
from rayclip.config import Config
from rayclip.errors import UserError, nearest
from rayclip.orchestration.cluster.resources import resource_request, shortage
from rayclip.orchestration.cluster.runtime_env import check_config, check_paths, pack
from rayclip.orchestration.cluster.submission import Cluster

ROOT = Path(__file__).resolve().parents[3]
USAGE = """usage: python -m jobs.submit JOB CONFIG key=value ... [--detach]    run a job on the cluster, and follow it
       python -m jobs.submit list                                   every job, the last first
       python -m jobs.submit status ID | logs ID | stop ID          look at one; follow it; stop it

  --address http://HEAD:8265  the cluster, or RAY_API_SERVER_ADDRESS in the environment
  RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH in the environment, where the cluster asks for it
  ctrl-c leaves the job running; the exit code is the job's"""


def command(arguments: list[str]) -> int:
    """Run a command; the exit code. Raises UserError."""
    if not arguments or {"-h", "--help"} & set(arguments[:1]):
        print_help(USAGE)
        return 0 if arguments else 2
    arguments, address = take_option(arguments, "--address")
    first, rest = arguments[0], arguments[1:]
    if first in ("list", "status", "logs", "stop"):
        return show(Cluster(address), first, rest)
    detach, rest = "--detach" in rest, [argument for argument in rest if argument != "--detach"]
    return submit(address, first, rest, detach)


def show(cluster: Cluster, command: str, rest: list[str]) -> int:
    """The commands for jobs that are there."""
    if len(list(filter(None, rest))) != (command != "list"):
        raise UserError(f"{command} takes {'no' if command == 'list' else 'one'} ID; list shows them")
    if command == "logs":
        return follow(cluster, rest[0])
    if command == "stop":
        print(f"{rest[0]} {cluster.stop(rest[0]).lower()}")
        return 0
    jobs = cluster.jobs() if command == "list" else [cluster.info(rest[0])]
    print_table(
        [(str(job.submission_id), f"{job.status.lower():<9}  {job.entrypoint}") for job in jobs] or [("no jobs", "")]
    )
    return 0


def submit(address: str | None, job: str, arguments: list[str], detach: bool) -> int:
    """Check, ship and start a job; follow it unless detached."""
    found = read_settings(job, arguments)
    if Path.cwd() != ROOT:
        raise UserError(f"submit from the root of the tree, '{ROOT}': it is what is shipped")
    shipment = pack(ROOT)
    check_config(arguments, shipment)
    schema: type[Config] = getattr(rayclip.config, found["kind"])
    config = schema.model_validate(found["config"])
    shared = check_paths(config, found["summary"], shipment, ROOT)
    cluster = Cluster(address)
    if missing := shortage(resource_request(config), cluster.capacity()):
        raise UserError(f"the cluster at {cluster.address} cannot place this job: {missing}")
    for line in (cluster.skew(), f"every node must have {', '.join(shared)}" if shared else None):
        if line:
            print(f"note: {line}", file=sys.stderr)
    name = found["config"].get("name") or Path(arguments[0]).stem
    from rayclip.orchestration.train.driver import code_version  # takes seconds, and list and stop do without

    job_id = cluster.submit(job, name, arguments, code_version())
    print(f"submitted {job_id}, with {len(shipment.files):,} files, {shipment.num_bytes / 1e6:.1f} MB", file=sys.stderr)
    if not detach:
        return follow(cluster, job_id)
    print(job_id)
    return 0


def read_settings(job: str, arguments: list[str]) -> dict[str, Any]:
    """What the job itself makes of its arguments. Raises the job's own UserError."""
    others = ("__init__", "__main__", "cli", "submit")
    jobs = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem not in others)
    if job not in jobs:
        raise UserError(f"no job '{job}': {nearest(job, jobs)}")
    done = subprocess.run([sys.executable, "-m", f"jobs.{job}", *arguments, "--check"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    settings: dict[str, Any] = json.loads(done.stdout)
    return settings


def follow(cluster: Cluster, job_id: str) -> int:
    """Show a job's output until it ends; ctrl-c leaves it running."""
    try:
        return cluster.follow(job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\n{job_id} runs on; python -m jobs.submit logs|status|stop {job_id}", file=sys.stderr)
        return 130
