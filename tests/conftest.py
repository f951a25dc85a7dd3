"""What the tests share."""

import io
import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from benchmarks.faulty_s3 import FaultyProxy
from benchmarks.peers import load_open_clip, load_transformers
from rayclip.config import ModelConfig, TextConfig, VisionConfig
from rayclip.data.formats.tar import write_shard
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from tests.training_process import TrainingProcess


def pytest_configure():
    """Processes that test side by side have a Ray folder and a core each."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        scratch = f"/tmp/ray-{os.getuid()}-{worker}"  # short: sockets lie below it
        Path(scratch, "ray").mkdir(parents=True, exist_ok=True)
        os.environ["RAY_TMPDIR"] = scratch
        torch.set_num_threads(1)


class ByRay(LoadScopeScheduling):
    """What shares a Ray stays together: each takes part of a core while it lives. Unit tests fill the gaps."""

    def _split_scope(self, nodeid):
        folder = nodeid.split("/")[1]
        return {"unit": nodeid, "e2e": nodeid.partition("::")[0]}.get(folder, folder)


def pytest_xdist_make_scheduler(config, log):
    """How `make test` shares the tests out."""
    return ByRay(config, log)


@pytest.fixture(scope="session")
def open_clip():
    """open_clip, the reference that peer tests compare with."""
    try:
        return load_open_clip()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def transformers():
    """Hugging Face's transformers, likewise."""
    try:
        return load_transformers()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3_server():
    """A proxy without faults before moto's server, with an empty bucket `data`."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = FaultyProxy(f"http://{host}:{port}")
    urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/data", method="PUT")).close()
    yield proxy
    proxy.close()
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """That proxy, named by AWS's environment; its settings are as they were after the test."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-nobody-else-may-read")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    before = s3_server.rate, s3_server.commands, s3_server.slow_s
    yield s3_server
    s3_server.rate, s3_server.commands, s3_server.slow_s = before


@pytest.fixture
def one_thread():
    """One torch thread, which tiny models are fastest with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_config():
    """A model of a few thousand weights beside its token embedding, which has CLIP's whole vocabulary."""
    return ModelConfig(
        embed_dim=16,
        vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        text=TextConfig(context_length=16, width=16, layers=1, heads=2),
    )


@pytest.fixture(scope="session")
def make_samples():
    """Samples with a random PNG of its own size each, a caption, and a class index."""

    def make(count, seed=0, num_classes=3):
        generator = np.random.default_rng(seed)
        samples = []
        for i in range(count):
            file = io.BytesIO()
            height, width = generator.integers(17, 40, 2)
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
            caption, label = f"picture number {i} of {i * i}", str(i % num_classes)
            key = f"{i:06}"
            samples.append(
                {"__key__": key.encode(), "png": file.getvalue(), "txt": caption.encode(), "cls": label.encode()}
            )
        return samples

    return make


@pytest.fixture(scope="session")
def write_dataset():
    """Writes samples as a data set into a folder, and gives its manifest."""

    def write(folder, samples, shard_samples=12, chunk_samples=5):
        folder.mkdir(parents=True, exist_ok=True)
        shards = []
        for start in range(0, len(samples), shard_samples):
            name = f"{len(shards):06}.tar"
            with (folder / name).open("wb") as file:
                spans = write_shard(file, samples[start : start + shard_samples], chunk_samples)
            shards.append((name, (folder / name).stat().st_size, spans))
        manifest = Manifest.from_spans(folder, shards)
        manifest.save()
        return manifest

    return write


@pytest.fixture(scope="session")
def make_config(tiny_config):
    """A training config as plain values: the tiny model on a data set; sections given are merged in."""

    def make(name, data_path, **sections):
        values = {
            "name": name,
            "seed": 3,
            "model": tiny_config.model_dump(mode="json"),
            "data": {"path": str(data_path)},
            "batch_size": 32,
            "optimizer": {"lr": 1e-3, "warmup_samples": 200},
            "tracking": {"experiment": "tests", "log_every_samples": 64},
        }
        for key, value in sections.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return values

    return make


@pytest.fixture
def start_training():
    """Starts `jobs.train` on a config in a folder; whatever still runs at the end of the test is killed."""
    started = []

    def start(folder, config, address=None, under=()):
        started.append(TrainingProcess(folder, config, address, under))
        return started[-1]

    yield start
    for training in started:
        if training.process.poll() is None:
            training.kill()
