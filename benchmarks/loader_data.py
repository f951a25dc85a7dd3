"""The data set that the loader is measured on, on disk or in an S3 server of its own on loopback."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from benchmarks.servers import free_port
from benchmarks.workload import jpegs, labels
from rayclip.data.formats.tar import Sample, Span, write_shard
from rayclip.data.manifest import Manifest
from rayclip.data.stream import StreamSpec
from rayclip.errors import UserError
from rayclip.io.storage import join, write_bytes

IMAGE_SIZE, CONTEXT = 224, 77
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
WINDOW, CHUNK = 8, 64

_DIFFERENT = 24
_SHARD = 256
_BUCKET = "loader"
_START_TIMEOUT_S = 60.0


_images = cache(jpegs)


class Data:
    """A data set of square JPEGs, on disk and in memory."""

    def __init__(self, folder: Path, side: int, images: int) -> None:
        folder.mkdir(exist_ok=True)
        files = _images(side, _DIFFERENT)
        self.files = [files[i % len(files)] for i in range(images)]
        self._shards: list[tuple[str, int, list[Span]]] = []
        for first in range(0, images, _SHARD):
            path = folder / f"{len(self._shards):06}.tar"
            with path.open("wb") as target:
                spans = write_shard(target, map(self._sample, range(first, min(first + _SHARD, images))), CHUNK)
            self._shards.append((path.name, path.stat().st_size, spans))
        self.folder, self.side, self.num_shards = folder, side, len(self._shards)
        self.manifest = Manifest.from_spans(folder, self._shards)
        self.manifest.save()

    def spec(self, epochs: int, manifest: Manifest | None = None) -> StreamSpec:
        """The stream of a run over it, or over a copy of it."""
        manifest = manifest or self.manifest
        return StreamSpec(
            folder=manifest.folder, digest=manifest.digest, seed=0, end=epochs * len(manifest), window=WINDOW,
            image_size=IMAGE_SIZE, context_length=CONTEXT, crop_scale=SCALE, crop_ratio=RATIO,
        )  # fmt: skip

    def copy_to(self, address: str) -> Manifest:
        """Put the shards and a manifest of theirs there."""
        for name, _, _ in self._shards:
            write_bytes(join(address, name), (self.folder / name).read_bytes())
        manifest = Manifest.from_spans(address, self._shards)
        manifest.save()
        return manifest

    def _sample(self, number: int) -> Sample:
        names = labels()
        caption = f"a photo of a {names[number % len(names)]} beside {number} others"
        return {"__key__": f"{number:09}".encode(), "jpg": self.files[number], "txt": caption.encode()}


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an empty bucket; this process's environment points to its server while it is there."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    settings = {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "loader", "AWS_SECRET_ACCESS_KEY": "loader",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ.update(settings)
    try:
        _create_bucket(server, f"{url}/{_BUCKET}")
        yield f"s3://{_BUCKET}/data"
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _create_bucket(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise UserError("moto's S3 server does not start: pip install 'moto[server]'") from None
            time.sleep(0.2)
