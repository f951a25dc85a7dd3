"""Every format, on disk and in S3, gives the pairs that were written into it; and S3 with faults loses none."""

import csv
import io
import json
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
from rayclip.io import s3 as s3_requests
from rayclip.io import storage
from rayclip.orchestration.batch.index import index

NUM_PAIRS = 23
CHUNK = 4
BUCKET = "s3://data"


def encode(seed, kind):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
PAIRS = [
    (extension, encode(i, KINDS[extension]), f'naïve pair, "no {i}"\tof many' + "\nin two lines" * (i % 5 == 0))
    for i in range(NUM_PAIRS)
    for extension in [list(KINDS)[i % 4]]
]


def write_webdataset(folder):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=9, verbose=0) as writer:
        for i, (extension, image, caption) in enumerate(PAIRS):
            writer.write({"__key__": f"{i:06}", extension: image, "txt": caption, "npy": np.zeros(3), "cls": i})


def write_img2dataset(folder):
    """00000.tar of .jpg .json .txt, 00000.parquet and 00000_stats.json beside it."""
    for shard, first in enumerate(range(0, NUM_PAIRS, 10)):
        pairs = list(enumerate(PAIRS))[first : first + 10]
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i, (extension, image, caption) in pairs:
                meta = {"caption": caption, "url": f"http://x/{i}", "key": f"{i:09}", "status": "success"}
                members = [
                    (extension, image),
                    ("json", json.dumps(meta, indent=4).encode()),
                    ("txt", caption.encode()),
                ]
                for ending, data in members[: 2 if i % 3 == 0 else 3]:
                    info = tarfile.TarInfo(f"{i:09}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        pq.write_table(pa.table({"url": [f"http://x/{i}" for i, _ in pairs]}), folder / f"{shard:05}.parquet")
        (folder / f"{shard:05}_stats.json").write_text("{}")


def write_parquet(folder, row_group_size=None):
    for shard, first in enumerate(range(0, NUM_PAIRS, 12)):
        _, pictures, captions = zip(*PAIRS[first : first + 12], strict=True)
        table = pa.table({"id": range(len(pictures)), "image": list(pictures), "caption": list(captions)})
        pq.write_table(table, folder / f"{shard}.parquet", row_group_size=row_group_size)


def write_images(folder):
    for i, (extension, image, _) in enumerate(PAIRS):
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / f"pictures/{i:03}.{extension}").write_bytes(image)
    return [f"pictures/{i:03}.{extension}" for i, (extension, _, _) in enumerate(PAIRS)]


def write_parquet_paths(folder):
    captions = [caption for _, _, caption in PAIRS]
    pq.write_table(pa.table({"image_path": write_images(folder), "title": captions}), folder / "t.parquet")


def write_huggingface(folder):
    images = [{"bytes": image, "path": f"{i}.jpg"} for i, (_, image, _) in enumerate(PAIRS)]
    pq.write_table(
        pa.table({"image": images, "text": [c for _, _, c in PAIRS]}), folder / "t.parquet", row_group_size=5
    )


def write_table(folder, separator, name):
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["n", "filepath", "title"])
        for i, path in enumerate(write_images(folder)):
            writer.writerow([i, path, PAIRS[i][2]])


def write_folder(folder):
    for i, path in enumerate(write_images(folder)):
        beside = (folder / path).with_suffix(".json" if i % 2 else ".txt")
        beside.write_text(json.dumps({"caption": PAIRS[i][2]}) if i % 2 else PAIRS[i][2])


WRITERS = {
    "webdataset": write_webdataset,
    "img2dataset": write_img2dataset,
    "parquet": lambda folder: write_parquet(folder, 4),
    "parquet of large groups": write_parquet,
    "parquet of paths": write_parquet_paths,
    "parquet of hugging face": write_huggingface,
    "csv": lambda folder: write_table(folder, ",", "pairs.csv"),
    "tsv": lambda folder: write_table(folder, "\t", "pairs.tsv"),
    "folder": write_folder,
}


def upload(folder, address):
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        storage.write_bytes(f"{address}/{path.relative_to(folder)}", path.read_bytes())


def pairs_of(manifest):
    """(chunk, row) to the picture's bytes and the caption."""
    found = {}
    for chunk in range(len(manifest)):
        for row, sample in enumerate(manifest.read_samples(chunk)):
            image = next(sample[extension] for extension in KINDS if extension in sample)
            found[chunk, row] = image, sample["txt"].decode()
    return found


def make_spec(manifest, **changes):
    crops = {"image_size": 8, "context_length": 16, "crop_scale": (0.9, 1.0), "crop_ratio": (1.0, 1.0)}
    values = {"folder": manifest.folder, "digest": manifest.digest, "seed": 1, "end": len(manifest), "window": 3}
    return StreamSpec(**{**values, **crops, **changes})


def joined(stream):
    batches = list(stream.batches(7))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.fixture
def in_process(monkeypatch):
    """Tasks one after another in this process, in the place of a cluster's."""
    monkeypatch.setattr("rayclip.orchestration.batch.index.run_tasks", lambda tasks, make, **_: map(make(), tasks))


@pytest.mark.parametrize("name", WRITERS)
def test_a_format_gives_its_pairs_from_disk_and_from_s3(name, tmp_path, s3, in_process):
    WRITERS[name](tmp_path)
    address = f"{BUCKET}/{name.replace(' ', '-')}"
    upload(tmp_path, address)
    summary = index(IndexConfig(path=str(tmp_path), chunk_samples=CHUNK))
    assert summary["samples"] == NUM_PAIRS
    local = Manifest.load(tmp_path)
    pairs = pairs_of(local)
    assert list(pairs.values()) == [(image, caption) for _, image, caption in PAIRS]
    assert index(IndexConfig(path=address, chunk_samples=CHUNK))["digest"] == local.digest
    remote = Manifest.load(address)
    remote.check_shards()
    assert pairs_of(remote) == pairs
    here, there = joined(Stream(make_spec(local))), joined(Stream(make_spec(remote)))
    assert not here["cause"].any()
    assert all(np.array_equal(here[key], there[key]) for key in here)
    again = index(IndexConfig(path=address, chunk_samples=CHUNK))
    assert (again["read"], again["digest"]) == (0, local.digest)


def test_only_shards_that_changed_are_read_again(tmp_path, in_process):
    write_webdataset(tmp_path)
    config = IndexConfig(path=str(tmp_path), chunk_samples=CHUNK)
    first = index(config)
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00000.tar").read_bytes())
    (tmp_path / "00003.tar").write_bytes((tmp_path / "00002.tar").read_bytes())
    second = index(config)
    assert (first["read"], second["read"], index(config)["read"]) == (3, 2, 0)
    assert second["samples"] == 9 + 9 + 5 + 5
    for name in ("00001.tar", "00003.tar"):
        (tmp_path / name).unlink()
    third = index(config)
    assert (third["read"], third["samples"]) == (0, 14)
    (tmp_path / "manifest.parquet").unlink()
    assert index(config)["digest"] == third["digest"]


def test_half_a_tar_is_told_or_its_whole_samples_are_taken(tmp_path, in_process):
    write_webdataset(tmp_path)
    half = tmp_path / "00001.tar"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    with pytest.raises(UserError, match=r"00001\.tar' is not a whole tar"):
        index(IndexConfig(path=str(tmp_path)))
    summary = index(IndexConfig(path=str(tmp_path), damaged_shards="salvage"))
    assert "00001.tar" in summary["problems"][0]
    kept = [caption for _, caption in pairs_of(Manifest.load(tmp_path)).values()]
    captions = [caption for _, _, caption in PAIRS]
    assert kept == captions[: len(kept) - 5] + captions[18:]
    assert 9 + 5 < len(kept) < NUM_PAIRS


def test_the_manifest_may_lie_elsewhere(tmp_path, in_process):
    (tmp_path / "shards").mkdir()
    write_webdataset(tmp_path / "shards")
    index(IndexConfig(path=str(tmp_path / "shards"), output=str(tmp_path / "here"), chunk_samples=CHUNK))
    assert not (tmp_path / "shards/manifest.parquet").exists()
    assert len(pairs_of(Manifest.load(tmp_path / "here"))) == NUM_PAIRS


def test_class_folders_are_captions_and_classes(tmp_path, in_process):
    for name in ("great_dane", "tabby-cat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(PAIRS[0][1])
    index(IndexConfig(path=str(tmp_path)))
    samples = Manifest.load(tmp_path).read_samples(0)
    assert [(s["txt"], s["cls"]) for s in samples] == [(b"great dane", b"0"), (b"tabby cat", b"1")]
    assert (tmp_path / "classnames.txt").read_text() == "great dane\ntabby cat\n"


def test_captions_are_drawn_by_weight_and_the_same_each_time(tmp_path, write_dataset):
    image = PAIRS[0][1]
    meta = json.dumps({"short": "b", "many": ["c", {"text": "d", "weight": 3}], "none": None}).encode()
    samples = [{"__key__": f"{i}".encode(), "jpg": image, "txt": b"a", "json": meta} for i in range(2000)]
    manifest = write_dataset(tmp_path, samples, shard_samples=2000, chunk_samples=500)
    weights = {"txt": 1.0, "short": 2.0, "many": 4.0, "none": 9.0, "missing": 9.0}
    stream = Stream(make_spec(manifest, end=2 * len(manifest), captions=weights))
    chosen = [[s["txt"] for p in (0, 1, 2, 3) for s in stream._fetch(p + first, p)] for first in (0, 0, 4)]
    assert chosen[0] == chosen[1] != chosen[2]
    shares = [chosen[0].count(text) / 2000 for text in (b"a", b"b", b"c", b"d")]
    assert np.allclose(shares, np.array([1, 2, 1, 3]) / 7, atol=0.03)
    assert {s["txt"] for s in manifest.read_samples(0)} == {b"a"}


def test_a_bad_row_of_a_table_is_one_bad_sample(tmp_path, in_process):
    (tmp_path / "0.jpg").write_bytes(PAIRS[0][1])
    rows = [b"0.jpg,fine", b"gone.jpg,no picture", b"0.jpg,\xff\xfe", b"0.jpg", b"0.jpg, ", b"0.jpg,fine"]
    (tmp_path / "pairs.csv").write_bytes(b"filepath,title\n" + b"\n".join(rows))
    index(IndexConfig(path=str(tmp_path)))
    batch = joined(Stream(make_spec(Manifest.load(tmp_path))))
    causes = [CAUSES[batch["cause"][batch["row"] == row][0]] for row in range(6)]
    assert causes == ["fine", "no_image", "caption_not_utf8", "no_caption", "caption_empty", "fine"]


@pytest.mark.parametrize("rate", [0.25])
def test_faulty_requests_lose_nothing(rate, tmp_path, s3, in_process, monkeypatch):
    monkeypatch.setattr(s3_requests, "_PATIENCE_S", 0.2)
    write_webdataset(tmp_path)
    index(IndexConfig(path=str(tmp_path), chunk_samples=CHUNK))
    wanted = pairs_of(Manifest.load(tmp_path))
    (tmp_path / "manifest.parquet").unlink()
    upload(tmp_path, f"{BUCKET}/faulty")
    monkeypatch.setattr(s3, "rate", rate)
    monkeypatch.setattr(s3, "slow_s", 1.0)
    assert index(IndexConfig(path=f"{BUCKET}/faulty", chunk_samples=CHUNK))["samples"] == NUM_PAIRS
    for _ in range(3):
        assert pairs_of(Manifest.load(f"{BUCKET}/faulty")) == wanted
    assert sum(s3.faults.values()) > 5


def test_what_cannot_be_read_is_counted_and_named(s3, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(s3_requests, "_ATTEMPTS", 2)
    write_webdataset(tmp_path)
    upload(tmp_path, f"{BUCKET}/gone")
    index(IndexConfig(path=f"{BUCKET}/gone", chunk_samples=CHUNK))
    manifest = Manifest.load(f"{BUCKET}/gone")
    storage.remove(f"{BUCKET}/gone/00001.tar")
    with pytest.raises(UserError, match=r"names shard '00001\.tar', which is not there"):
        manifest.check_shards()
    causes = joined(Stream(make_spec(manifest)))["cause"]
    assert np.bincount(causes)[[0, 1]].tolist() == [NUM_PAIRS - 9, 9]
    monkeypatch.setattr(s3, "rate", 1.0)
    monkeypatch.setattr(s3, "slow_s", 0.0)
    with pytest.raises(OSError, match=r"gone/00000\.tar"):
        for _ in range(20):
            storage.read_range(f"{BUCKET}/gone/00000.tar", 0, 512)
