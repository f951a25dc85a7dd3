"""Jobs on another machine's cluster, through Ray's job API: submit, follow, look at, stop."""

import asyncio
import os
import platform
import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import ray
import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from rayclip.errors import UserError
from rayclip.orchestration.cluster.connection import storage_environment
from rayclip.orchestration.cluster.ray_internals import cluster_versions, quieten_job_client
from rayclip.orchestration.cluster.resources import Capacity, most_of
from rayclip.orchestration.cluster.runtime_env import Shipment

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""In the environment: the cluster that is spoken to; Ray's own name for it."""
_POLL_S = 0.5
_SETTLE_S = 60.0
_RECONNECTS = 5


class Cluster:
    """A cluster's job API. Every method raises UserError for a cluster that does not answer, or not to this caller."""

    def __init__(self, address: str | None) -> None:
        quieten_job_client()
        if address:
            os.environ[ADDRESS] = address  # Ray reads it before any argument
        self.address = os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS") or ""
        if not self.address.startswith(("http://", "https://")):
            raise UserError(f"give the address of the cluster: --address http://HEAD:8265, or {ADDRESS}")
        with self._explained():
            self._client = JobSubmissionClient(self.address)

    def skew(self) -> str | None:
        """How the cluster's Python and Ray differ from this process's, or None: what is pickled there is read there."""
        with self._explained():
            there = cluster_versions(self._client)
        here = {"Ray": ray.__version__, "Python": platform.python_version()}
        pairs = [(name, there[name], own) for name, own in here.items()]
        differ = [f"{name} {its} where this machine has {own}" for name, its, own in pairs if its != own]
        return f"the cluster has {' and '.join(differ)}" if differ else None

    def capacity(self) -> Capacity:
        """Its nodes as they are, and what they may grow to."""
        with self._explained():
            # Ray takes the nodes that a filter leaves out, as those that have died, for missing output.
            alive: Any = [("state", "=", "ALIVE")]
            nodes = list_nodes(self.address, alive, limit=10_000, detail=True, raise_on_missing_output=False)
        return Capacity([node.resources_total for node in nodes], most_of([node.labels for node in nodes]))

    def submit(self, job: str, name: str, arguments: list[str], shipment: Shipment, code_version: str) -> str:
        """Upload a shipment, and start `python -m rayclip JOB ARGUMENTS` in its folder; the job's id."""
        environment = shipment.runtime_env
        environment["env_vars"] |= {**storage_environment(), "RAYCLIP_CODE_VERSION": code_version}
        request: dict[str, Any] = {
            "entrypoint": shlex.join(["python", "-m", "rayclip", job, *arguments]),
            "submission_id": f"{job}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{uuid.uuid4().hex[:6]}",
            "runtime_env": environment,
            "metadata": {"code_version": code_version},
        }
        deadline = time.monotonic() + _SETTLE_S
        while True:
            try:
                with self._explained():
                    return self._client.submit_job(**request)
            except UserError as error:
                # A cluster that has just started has no agent yet that takes jobs.
                if "try again later" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    def follow(self, job_id: str, show: Callable[[str], None]) -> int:
        """Show what the job prints until it has ended; its exit code."""
        seen = 0
        for attempt in range(_RECONNECTS + 1):
            try:
                with self._explained():
                    seen = asyncio.run(self._show(job_id, show, seen))
                break
            except UserError:
                self.info(job_id)  # it is not there, or the cluster is not
                if attempt == _RECONNECTS:
                    raise
                time.sleep(_POLL_S)
        return self._exit_code(job_id)

    def info(self, job_id: str) -> JobDetails:
        """What the cluster knows of a job."""
        with self._explained():
            return self._client.get_job_info(job_id)

    def jobs(self) -> list[JobDetails]:
        """Every job that was submitted, the last first."""
        with self._explained():
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)

    def stop(self, job_id: str) -> JobStatus:
        """Ask a job to stop, and wait until it has; the state that it ended in."""
        with self._explained():
            self._client.stop_job(job_id)
        return self._ended(job_id, _SETTLE_S).status

    async def _show(self, job_id: str, show: Callable[[str], None], seen: int) -> int:
        """The log from its first character on; what has been seen already is left out."""
        at = 0
        async for text in self._client.tail_job_logs(job_id):
            at += len(text)
            if at > seen:
                show(text[max(0, len(text) - (at - seen)) :])
                seen = at
        return seen

    def _ended(self, job_id: str, timeout_s: float) -> JobDetails:
        deadline = time.monotonic() + timeout_s
        while not (info := self.info(job_id)).status.is_terminal():
            if time.monotonic() > deadline:
                raise UserError(f"job {job_id} is still {info.status} after {timeout_s:.0f} s")
            time.sleep(_POLL_S)
        return info

    def _exit_code(self, job_id: str) -> int:
        info = self._ended(job_id, _SETTLE_S)
        if info.status == JobStatus.SUCCEEDED:
            return 0
        if info.driver_exit_code is None:  # it never ran, or was stopped
            raise UserError(f"job {job_id} {info.status.lower()}: {' '.join((info.message or '').split())}")
        return info.driver_exit_code % 256 if info.driver_exit_code > 0 else 128 - info.driver_exit_code

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            self._explain_token(str(error))
        except (ConnectionError, requests.RequestException, ClientError) as error:
            raise UserError(f"no Ray cluster answers at {self.address}: {_first_line(error)}") from None
        except UserError:
            raise
        except (RuntimeError, ValueError, RayStateApiException) as error:
            raise UserError(f"the cluster at {self.address} says: {_first_line(error)}") from None

    def _explain_token(self, error: str) -> NoReturn:
        how = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
        if "Invalid" in error:
            raise UserError(f"the cluster at {self.address} does not take this token: look at {how}") from None
        raise UserError(f"the cluster at {self.address} asks for a token: set {how}") from None


def _first_line(error: BaseException) -> str:
    """The part of Ray's messages that says what happened: a server's own traceback comes back whole."""
    text = re.sub(r"^Request failed with status code \d+: ", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1 if "Traceback" in str(error) else 0] if lines else type(error).__name__
