"""A real service as a process of its own: Ray, HAProxy, four deployments, on a tiny model."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import RunState, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
START_S = 240
"""Longest wait for a service to answer, on a busy machine."""


class ServiceProcess:
    """`python -m serve ARGUMENTS` in a folder, answering at `url`."""

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        port = find_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "serve.log"
        paths = f"{ROOT}{os.pathsep}{ROOT / 'platform'}"
        variables = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
        variables.pop("RAY_ADDRESS", None)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve", *arguments, f"port={port}"],
                cwd=folder,
                env=variables,
                stdout=log,
                stderr=log,
            )

    def wait(self) -> "ServiceProcess":
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"it ended: {self.log.read_text()}"
            try:
                if urllib.request.urlopen(f"{self.url}/healthz", timeout=10).status == 200:
                    return self
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"no answer in {START_S} s: {self.log.read_text()}")

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment's replicas."""
        title = f"ray::ServeReplica:rayclip:{deployment}"
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ask(self, method: str, path: str, body=None, headers=None) -> tuple[int, object, dict]:
        """Status, answer, headers. A body that is no bytes goes as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, {**kind, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, _content(response), dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, _content(error), dict(error.headers)

    def post(self, path: str, body) -> dict:
        """The answer to a request that must succeed."""
        status, answer, _ = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def stop(self) -> int:
        """As ctrl-c does. The exit code."""
        tree = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -1
        finally:
            for process in psutil.wait_procs(tree, timeout=10)[1]:
                process.kill()


def find_port() -> int:
    """A port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _content(response):
    body = response.read()
    return json.loads(body) if body and "json" in response.headers.get("Content-Type", "") else body


@pytest.fixture(scope="session")
def write_model(tiny_config):
    """Writes a tiny model with weights of its own as a checkpoint; gives the folder."""

    def write(folder: Path, seed: int, **settings: object) -> Path:
        torch.manual_seed(seed)
        model = CLIP(tiny_config)
        optimizer = torch.optim.AdamW(model.parameters())
        config = {"name": "tiny", "model": tiny_config.model_dump(mode="json"), **settings}
        write_checkpoint(folder, model, optimizer, RunState(), config, {"seed": seed})
        return folder

    return write


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, write_model):
    """A tiny model's checkpoint."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


@pytest.fixture
def free_port():
    """A port of loopback that nobody has."""
    return find_port()


@pytest.fixture(scope="module")
def start_service(tmp_path_factory):
    """Starts services; what still runs at the end of the module is stopped, for even an idle one takes its share."""
    started = []

    def start(*arguments: str, **options) -> ServiceProcess:
        started.append(ServiceProcess(tmp_path_factory.mktemp("service"), *arguments, **options))
        return started[-1].wait()

    yield start
    with ThreadPoolExecutor() as threads:  # each takes a while to let its requests end
        list(threads.map(ServiceProcess.stop, [each for each in started if each.process.poll() is None]))


@pytest.fixture(scope="session")
def service(tmp_path_factory, model_folder):
    """A service with one replica of each, without API keys, on loopback."""
    folder = tmp_path_factory.mktemp("service")
    service = ServiceProcess(folder, f"model={model_folder}", "templates=photo_ensemble", "poll_s=0.3")
    yield service.wait()
    assert service.stop() == 130


@pytest.fixture(scope="session")
def service_url(service):
    """Where it answers."""
    return service.url


@pytest.fixture(scope="session")
def make_image():
    """Encoded pictures, each its own."""

    def make(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
        generator = np.random.default_rng(seed)
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def encoded(make_image):
    """The same as base64 text."""
    return lambda *args, **options: base64.b64encode(make_image(*args, **options)).decode()
