"""What faults of S3 cost: a data set loaded, and trained on, from a loopback server, with and without faulty requests.

One request in twenty goes wrong, in turn at random: an answer 500, a body that stops half way for three seconds, a
connection cut in the middle, one dropped before the answer. Both sides go through the same proxy before moto's server,
in a process of their own; they take turns, and the ratio is that of neighbours.
"""

import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.config import BenchmarkConfig
from benchmarks.faulty_s3 import FaultyProxy
from benchmarks.workload import jpegs
from rayclip.config import TrainConfig
from rayclip.data.formats.tar import Sample, Span, write_shard
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.errors import UserError
from rayclip.io import s3
from rayclip.orchestration.cluster.connection import connect
from rayclip.orchestration.train.driver import run_training

_SIDE, _IMAGE_SIZE, _CONTEXT = 256, 224, 77
_SHARD, _CHUNK, _WINDOW = 512, 32, 8
_READERS = 2  # windows in work at once, as Ray's reader tasks are in a run
_DIFFERENT = 24
_RATE = 0.05
_RUNS, _EPOCHS = 3, 10
_MODEL = {
    "embed_dim": 64,
    "vision": {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "heads": 2},
    "text": {"context_length": 32, "width": 64, "layers": 2, "heads": 2},
}
_BUCKET = "benchmark"
_START_TIMEOUT_S = 60.0


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Seconds of a pass over the data with and without faults, and of a run, and their ratios.

    Raises UserError without moto.
    """
    with s3_server() as server, tempfile.TemporaryDirectory() as folder:
        spec = _write(Path(folder), config.images)
        _load(server, spec, 0.0)
        passes = [(_load(server, spec, 0.0), _load(server, spec, _RATE)) for _ in range(config.repeats)]
        connect(local_cpus=config.workers + 1)
        runs = [(_train(config, server, folder, 0.0), _train(config, server, folder, _RATE)) for _ in range(_RUNS)]
    clean, faulty = zip(*passes, strict=True)
    return {
        "pictures": config.images,
        "rate_of_faults": _RATE,
        "clean_s": round(statistics.median(one.seconds for one in clean), 2),
        "faulty_s": round(statistics.median(one.seconds for one in faulty), 2),
        "ratio": round(statistics.median(b.seconds / a.seconds for a, b in passes), 3),
        "largest_ratio": round(max(b.seconds / a.seconds for a, b in passes), 3),
        "requests": sum(one.num_requests for one in faulty),
        "faults": {kind: sum(one.faults[kind] for one in faulty) for kind in faulty[0].faults},
        "lost": sum(config.images - one.num_samples for one in (*clean, *faulty)),
        "runs_clean_s": [round(a.seconds, 1) for a, _ in runs],
        "runs_faulty_s": [round(b.seconds, 1) for _, b in runs],
        "runs_ratio": round(statistics.median(b.seconds / a.seconds for a, b in runs), 3),
        "runs_requests": sum(b.num_requests for _, b in runs),
        "runs_lost": sum(config.images * _EPOCHS - one.num_samples for pair in runs for one in pair),
    }


@dataclass(frozen=True)
class Pass:
    """One pass over the data, or a run: samples that came, and what the server did meanwhile."""

    seconds: float
    num_samples: int
    num_requests: int
    faults: dict[str, int]


@dataclass(frozen=True)
class Server:
    """A server in another process."""

    pipe: Connection

    def set_rate(self, rate: float) -> tuple[int, dict[str, int]]:
        """Share of requests that go wrong from now on; (requests, faults by kind) since it was last set."""
        self.pipe.send(rate)
        received: tuple[int, dict[str, int]] = self.pipe.recv()
        return received


@contextmanager
def s3_server() -> Iterator[Server]:
    """moto's server behind a proxy, which AWS's environment names meanwhile. Raises UserError without moto."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    before = dict(os.environ)
    try:
        url = ours.recv() if ours.poll(_START_TIMEOUT_S) else None
        if url is None:
            raise UserError("no S3 server to measure with: pip install 'moto[s3,server]'")
        names = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(names | {"AWS_ENDPOINT_URL": url})
        s3.client().mkdir(_BUCKET)
        yield Server(ours)
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.terminate()
        process.join()


def _serve(pipe: Connection) -> None:
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        pipe.send(None)
        return
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = FaultyProxy(f"http://{host}:{port}")
    pipe.send(proxy.url)
    while True:
        proxy.rate = pipe.recv()
        pipe.send((proxy.num_requests, dict(proxy.faults)))
        proxy.num_requests, proxy.faults = 0, dict.fromkeys(proxy.faults, 0)


def _write(folder: Path, pictures: int) -> StreamSpec:
    """Tar shards in the bucket, and the stream of one epoch over them."""
    files = jpegs(_SIDE, _DIFFERENT)
    shards: list[tuple[str, int, list[Span]]] = []

    def sample(number: int) -> Sample:
        caption = f"picture {number} of {pictures}"
        return {"__key__": f"{number:09}".encode(), "jpg": files[number % len(files)], "txt": caption.encode()}

    address = f"s3://{_BUCKET}/set"
    for first in range(0, pictures, _SHARD):
        path = folder / f"{len(shards):06}.tar"
        with path.open("wb") as target:
            spans = write_shard(target, map(sample, range(first, min(first + _SHARD, pictures))), _CHUNK)
        s3.upload(path, f"{address}/{path.name}")
        shards.append((path.name, path.stat().st_size, spans))
    manifest = Manifest.from_spans(address, shards)
    manifest.save()
    return StreamSpec(
        folder=address, digest=manifest.digest, seed=0, end=len(manifest), window=_WINDOW, image_size=_IMAGE_SIZE,
        context_length=_CONTEXT, crop_scale=(0.9, 1.0), crop_ratio=(3 / 4, 4 / 3),
    )  # fmt: skip


def _load(server: Server, spec: StreamSpec, rate: float) -> Pass:
    server.set_rate(rate)
    stream, started = Stream(spec), time.perf_counter()
    with ThreadPoolExecutor(_READERS) as readers:
        num_samples = sum(int((block["num_tokens"] > 0).sum()) for block in readers.map(stream.read, stream.windows()))
    seconds = time.perf_counter() - started
    return Pass(seconds, num_samples, *server.set_rate(0.0))


def _train(config: BenchmarkConfig, server: Server, folder: str, rate: float) -> Pass:
    """A run with data and checkpoints in the bucket: the time of its steps, and of waiting for their data."""
    server.set_rate(rate)
    name = f"run-{time.time_ns()}"
    run = TrainConfig.model_validate(
        {
            "name": name,
            "runs": f"s3://{_BUCKET}/runs",
            "model": _MODEL,
            "data": {"path": f"s3://{_BUCKET}/set"},
            "epochs": _EPOCHS,
            "batch_size": 64,
            "checkpoint": {"every_samples": config.images},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
            "cluster": {"num_workers": config.workers},
        }
    )
    summary = run_training(run)
    return Pass(float(summary["train_time_s"]), summary["samples_seen"], *server.set_rate(0.0))
