"""Damage of every kind: what `index` says of each sample is what training meets, with its cause."""

import io
import random
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayclip.config import IndexConfig
from rayclip.data.decode import CAUSES
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.errors import UserError
from rayclip.orchestration.batch.index import index

NUM_SAMPLES = 12
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}


def picture(number):
    extension = list(KINDS)[number % len(KINDS)]
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, KINDS[extension])
    return extension, file.getvalue()


PICTURES = [picture(number) for number in range(NUM_SAMPLES)]


def write_tar(folder):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for number, (extension, data) in enumerate(PICTURES):
            for name, content in ((f"{number:03}.{extension}", data), (f"{number:03}.txt", b"one of %d" % number)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    return folder / "0.tar", file.getvalue()


def write_table(folder):
    for number, (extension, data) in enumerate(PICTURES):
        (folder / f"{number}.{extension}").write_bytes(data)
    captions = ["plain", '"in quotes, with a comma"', '"of two\nlines"', "and twice"]
    rows = [f"{number}.{PICTURES[number][0]},{captions[number % 4]}" for number in range(NUM_SAMPLES)]
    return folder / "pairs.csv", "\n".join(["filepath,title", *rows, ""]).encode()


def write_parquet(folder):
    images = [None if number == 5 else data for number, (_, data) in enumerate(PICTURES)]
    file = io.BytesIO()
    table = pa.table({"image": pa.array(images, pa.binary()), "caption": [f"one of {i}" for i in range(NUM_SAMPLES)]})
    pq.write_table(table, file, row_group_size=4, compression="none")
    return folder / "0.parquet", file.getvalue()


WRITERS = {"tar": write_tar, "table": write_table, "parquet": write_parquet}


def damaged(data, generator):
    """The bytes after one to three changes: other bytes, some gone, some twice, the end cut off."""
    for _ in range(generator.randint(1, 3)):
        at, length = generator.randrange(len(data)), generator.choice([1, 1, 2, 7, 100])
        head, middle, tail = data[:at], data[at : at + length], data[at + length :]
        kind = generator.choice(["other", "other", "quote", "gone", "twice", "cut"])
        if kind == "other":
            middle = bytes(generator.randrange(256) for _ in middle)
        elif kind == "quote":
            middle = generator.choice([b'"', b",", b"\n", b"\t", b"\0"]) + middle[1:]
        elif kind == "gone":
            middle = b""
        elif kind == "twice":
            middle += middle
        else:
            tail = b""
        data = head + middle + tail or b"?"
    return data


def streamed(manifest):
    """How often training meets each cause, "fine" among them."""
    spec = StreamSpec(
        folder=manifest.folder, digest=manifest.digest, seed=1, end=len(manifest), window=2, image_size=8,
        context_length=16, crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0),
    )  # fmt: skip
    stream, found = Stream(spec), {}
    for batch in stream.batches(5):
        chunks = stream.order.chunks(batch["position"]).tolist()
        for chunk, row, cause in zip(chunks, batch["row"].tolist(), batch["cause"].tolist(), strict=True):
            found[chunk] = found.get(chunk, {}) | {row: CAUSES[cause]}
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL, of what it finds in damaged files
@pytest.mark.parametrize("kind", WRITERS)
def test_what_index_says_is_what_training_meets(kind, tmp_path, monkeypatch):
    path, data = WRITERS[kind](tmp_path)
    num_read = num_told = 0
    for seed in range(200):
        path.write_bytes(damaged(data, random.Random(seed)))
        for left in ("manifest.parquet", "index.json"):
            (tmp_path / left).unlink(missing_ok=True)
        try:
            summary = index(IndexConfig(path=str(path), chunk_samples=3, damaged_shards="salvage"))
        except UserError:
            num_told += 1
            continue
        num_read += 1
        found = streamed(Manifest.load(tmp_path))
        causes = [cause for rows in found.values() for cause in rows.values()]
        assert len(causes) == summary["samples"], seed
        assert {cause: causes.count(cause) for cause in set(causes) - {"fine"}} == summary["unreadable"], seed
        assert causes.count("fine") == summary["readable"], seed
    assert num_read > 30
    assert num_read + num_told == 200
