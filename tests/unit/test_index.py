"""Data as users really have it: what `index` says of it, on disk and in S3, and that training reads the same."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayclip.config import IndexConfig
from rayclip.data.decode import CAUSES, read_image, to_rgb
from rayclip.data.index import describe_findings
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.errors import UserError
from rayclip.io import storage
from rayclip.orchestration.batch.index import index

BUCKET = "s3://data"


def picture(number, kind="JPEG", size=(18, 24)):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def tar(*members):
    """The bytes of a tar of (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return file.getvalue()


def pair(stem, number=0):
    return (f"{stem}.jpg", picture(number)), (f"{stem}.txt", f"text {number}".encode())


def pairs(stems):
    return [member for number, stem in enumerate(stems) for member in pair(stem, number)]


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def pictures(count, folder=""):
    return {f"{folder}{i}.jpg": picture(i) for i in range(count)}


def profiled_png(size):
    """With a colour profile of so many bytes, all zero."""
    data, profile = picture(0, "PNG"), b"grey\0\0" + zlib.compress(bytes(size))
    checksum = zlib.crc32(b"iCCP" + profile)
    after_header = 8 + 25
    chunk = struct.pack(">I", len(profile)) + b"iCCP" + profile + struct.pack(">I", checksum)
    return data[:after_header] + chunk + data[after_header:]


def metadata_lines(count):
    return "".join(json.dumps({"file_name": f"{i}.jpg", "text": f"text {i}"}) + "\n" for i in range(count)).encode()


def numbered(count):
    return [f"{i:03}" for i in range(count)]


TSV_CAPTIONS = ["plain", '"begins with a quote', "a", '"quoted whole"', 'in "the" middle', '"7 inch', '"twice" said']

# Of each: its files; how many samples there are and can be read; and what else the summary says.
CASES = {
    "the key and the extensions repeat": (
        {"0.tar": tar(*pairs([stem for stem in numbered(30) for _ in range(2)]))},
        (60, 60),
        {"repeated_keys": 30, "examples": {"repeated_key": ["0.tar/000", "0.tar/001", "0.tar/002"]}, "unreadable": {}},
    ),
    "one key for all": ({"a.tar": tar(*pairs(["image"] * 40))}, (40, 40), {"repeated_keys": 39}),
    "a key that comes again later": (
        {"0.tar": tar(*pairs(["a", "b", "a"]))},
        (3, 3),
        {"repeated_keys": 1, "examples": {"repeated_key": ["0.tar/a"]}},
    ),
    "dots in names": (
        {"0.tar": tar(*pairs([f"photo.{i:03}" for i in range(20)]))},
        (1, 0),
        {"notes": "'photo.000.jpg': a sample's name ends at the first dot"},
    ),
    "pictures first, then captions": (
        {"0.tar": tar(*pairs(numbered(30))[::2], *pairs(numbered(30))[1::2])},
        (60, 0),
        {"unreadable": {"no_caption": 30, "no_image": 30}, "notes": "tar cf SORTED.tar --sort=name"},
    ),
    "files that macOS adds": (
        {
            "0.tar": tar(*[m for s in "abc" for p in pair(s) for m in ((f"._{p[0]}", b"\0\5\x16\7"), p)]),
            "._0.tar": b"x",
        },
        (3, 3),
        {"ignored": 7},
    ),
    "captions that begin with a quote": (
        {"p.tsv": "\n".join(["filepath\ttitle", *(f"{i}.jpg\t{c}" for i, c in enumerate(TSV_CAPTIONS))]).encode()}
        | pictures(len(TSV_CAPTIONS)),
        (7, 7),
        {"notes": "3 quotes at the start of a field without one at its end"},
    ),
    "a comma without quotes": (
        {"p.csv": b"filepath,title\n0.jpg,a dog, a cat\n" + b"".join(b"%d.jpg,x\n" % i for i in range(1, 8))}
        | pictures(8),
        (8, 7),
        {"unreadable": {"row_malformed": 1}, "notes": "1 row with more fields than the header skipped, on line 2"},
    ),
    "metadata.jsonl": ({"train/metadata.jsonl": metadata_lines(8), **pictures(8, "train/")}, (8, 8), {}),
    "img2dataset's files": (
        pictures(8, "00000/")
        | {f"00000/{i}.txt": b"text" for i in range(8)}
        | {"00000.parquet": parquet(url=["u"] * 8, caption=["x"] * 8)},
        (8, 8),
        {"passed_over": {".parquet": 1}, "notes": "00000.parquet' has no column 'image'"},
    ),
    "null pictures": (
        {"0.parquet": parquet(caption=["x"] * 8, jpg=pa.array([*map(picture, range(6)), None, None], pa.binary()))},
        (6, 6),
        {"absent": 2},
    ),
    "a large chunk in a PNG": (
        {"0.tar": tar(("0.png", profiled_png(3_000_000)), ("0.txt", b"x"), *pair("1"))},
        (2, 2),
        {},
    ),
    "a thin picture": (
        {"0.tar": tar(("0.png", picture(0, "PNG", (15_000, 1))), ("0.txt", b"x"), *pairs(["1", "2"]))},
        (3, 2),
        {"unreadable": {"image_too_thin": 1}, "examples": {"image_too_thin": ["0.tar/0"]}},
    ),
    "more kinds of pictures": (
        {
            "0.tar": tar(
                *[
                    member
                    for extension, kind in {
                        "gif": "GIF",
                        "bmp": "BMP",
                        "tif": "TIFF",
                        "TIFF": "TIFF",
                        "avif": "AVIF",
                        "jfif": "JPEG",
                    }.items()
                    for member in ((f"{extension}.{extension}", picture(1, kind)), (f"{extension}.txt", b"x"))
                ]
            )
        },
        (6, 6),
        {},
    ),
    "semicolons, and a header in capitals": (
        {"p.csv": b"FilePath;Title\n0.jpg;a dog, a cat\n1.jpg;x\n"} | pictures(2),
        (2, 2),
        {},
    ),
    "bars": ({"p.csv": b"image|caption\n0.jpg|a, b; c\n1.jpg|x\n"} | pictures(2), (2, 2), {}),
    "captions in a list": (
        {"0.parquet": parquet(image=[picture(0), picture(1)], title=[["one", "two"], ["three"]])},
        (2, 2),
        {},
    ),
    "a caption in a struct": (
        {"0.parquet": parquet(image=[picture(0), picture(1)], caption=[{"en": "one", "n": 1}, {"en": "two", "n": 2}])},
        (2, 2),
        {},
    ),
    "git-lfs pointers": (
        {"0.tar": tar(("0.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), ("0.txt", b"x"))},
        (1, 0),
        {"unreadable": {"image_undecodable": 1}, "notes": "git lfs pull"},
    ),
}


def put(files, target):
    for name, content in files.items():
        storage.write_bytes(f"{target}/{name}", content)


def stream_of(path):
    """Every sample's cause, in the manifest's order, as training meets it; and the captions of those that are fine."""
    manifest = Manifest.load(path)
    spec = StreamSpec(
        folder=path, digest=manifest.digest, seed=1, end=len(manifest), window=3, image_size=8,
        context_length=16, crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0),
    )  # fmt: skip
    stream, found = Stream(spec), {}
    for batch in stream.batches(7):
        chunks = stream.order.chunks(batch["position"]).tolist()
        found |= {
            (chunk, row): CAUSES[cause]
            for chunk, row, cause in zip(chunks, batch["row"].tolist(), batch["cause"].tolist(), strict=True)
        }
    return [found[place] for place in sorted(found)]


@pytest.fixture
def in_process(monkeypatch):
    """Tasks one after another in this process, in the place of a cluster's."""
    monkeypatch.setattr("rayclip.orchestration.batch.index.run_tasks", lambda tasks, make, **_: map(make(), tasks))


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("name", CASES)
def test_what_users_have_is_read_or_said(name, where, tmp_path, s3, in_process):
    files, (samples, readable), said = CASES[name]
    path = str(tmp_path) if where == "disk" else f"{BUCKET}/{name.replace(' ', '-')}"
    put(files, path)
    summary = index(IndexConfig(path=path, chunk_samples=5))
    assert (summary["samples"], summary["readable"]) == (samples, readable)
    note, facts = said.get("notes"), {key: value for key, value in said.items() if key != "notes"}
    assert not summary["notes"] if note is None else note in summary["notes"][0]
    assert {key: summary[key] for key in facts} == facts
    causes = stream_of(path)
    assert causes.count("fine") == readable
    assert {cause: causes.count(cause) for cause in set(causes) - {"fine"}} == summary["unreadable"]
    again = index(IndexConfig(path=path, chunk_samples=5))
    of_this_time = {"read": 0, "keys_across_shards": None}
    assert again | of_this_time == summary | of_this_time
    assert f"{readable:,} of {samples:,} samples can be read" in describe_findings(summary)[0]


def test_a_second_table_does_not_replace_the_first_ones_manifest(tmp_path, in_process):
    for name, count in (("a", 6), ("b", 2)):
        rows = [f"{i}.jpg\tx" for i in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    put(pictures(6), tmp_path)
    first = index(IndexConfig(path=str(tmp_path / "a.tsv")))
    with pytest.raises(UserError, match=r"is of 6 samples in 'a\.tsv', which '.*b\.tsv' leaves out: give output="):
        index(IndexConfig(path=str(tmp_path / "b.tsv")))
    assert Manifest.load(tmp_path).digest == first["digest"]
    assert index(IndexConfig(path=str(tmp_path / "b.tsv"), output=str(tmp_path / "b")))["samples"] == 2
    assert index(IndexConfig(path=str(tmp_path)))["samples"] == 8
    assert index(IndexConfig(path=str(tmp_path / "b.tsv"), replace=True))["samples"] == 2


def test_names_of_classes_that_somebody_wrote_are_not_replaced_in_silence(tmp_path, in_process):
    put(pictures(2, "cat/") | pictures(2, "dog/"), tmp_path)
    mine, config = tmp_path / "classnames.txt", IndexConfig(path=str(tmp_path))
    mine.write_text("a cat\na dog\n")
    with pytest.raises(UserError, match="calls class 0 'a cat' and its folder is 'cat': move it elsewhere"):
        index(config)
    assert mine.read_text() == "a cat\na dog\n" and not (tmp_path / "listing.tsv").exists()
    mine.unlink()
    assert not index(config)["notes"]
    put(pictures(2, "bird/"), tmp_path)
    (note,) = index(config)["notes"]
    assert note.endswith("is replaced: it names 2 classes and the folders are 3")
    assert mine.read_text() == "bird\ncat\ndog\n"


def test_shards_that_were_written_anew_are_said(tmp_path, in_process, caplog):
    put({"0.tar": tar(*pairs("ab")), "1.tar": tar(*pairs("cd"))}, tmp_path)
    index(IndexConfig(path=str(tmp_path)))
    Manifest.load(tmp_path).check_shards()
    assert not caplog.records
    os.utime(tmp_path / "1.tar", (1, 1))
    Manifest.load(tmp_path).check_shards()
    assert "1 of 2 shards" in caplog.text and f"rayclip index {tmp_path}" in caplog.text


def test_keys_that_come_again_in_another_shard_are_counted_and_named(tmp_path, in_process):
    put({"0.tar": tar(*pairs("abc")), "1.tar": tar(*pairs("xbc")), "2.tar": tar(*pairs("cde"))}, tmp_path)
    summary = index(IndexConfig(path=str(tmp_path)))
    assert summary["keys_across_shards"]["samples"] == 3 and summary["repeated_keys"] == 0
    said = "3 samples with the key of one in another shard, as in '0.tar' and '1.tar': each is a sample by itself"
    lines = describe_findings(summary)
    assert said in lines or said.replace("'1.tar'", "'2.tar'") in lines
    (tmp_path / "0.tar").write_bytes(tar(*pairs("bd")))
    (tmp_path / "1.tar").write_bytes(tar(*pairs("b")))
    lines = describe_findings(index(IndexConfig(path=str(tmp_path))))
    assert any("1 sample with the key of one in another shard of 2 compared" in line for line in lines)


def test_a_part_of_the_pictures_does_not_replace_the_listing_of_all(tmp_path, in_process):
    put(pictures(4, "a/") | pictures(4, "b/"), tmp_path)
    assert index(IndexConfig(path=str(tmp_path)))["samples"] == 8
    listing = (tmp_path / "listing.tsv").read_bytes()
    with pytest.raises(UserError, match=r"leaves out"):
        index(IndexConfig(path=f"{tmp_path}/a/*.jpg", output=str(tmp_path)))
    assert (tmp_path / "listing.tsv").read_bytes() == listing


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_braces_and_globs_name_shards(where, tmp_path, s3, in_process):
    path = str(tmp_path) if where == "disk" else f"{BUCKET}/patterns"
    put({f"{i:05}.tar": tar(*pairs([f"{i}{j}" for j in range(3)])) for i in range(4)}, path)
    assert index(IndexConfig(path=f"{path}/{{00001..00002}}.tar", output=f"{path}/two"))["samples"] == 6
    assert Manifest.load(f"{path}/two").shards == ("00001.tar", "00002.tar")
    assert index(IndexConfig(path=f"{path}/*.tar"))["samples"] == 12
    part = Manifest.load(f"{path}/0000[03].tar")
    assert (part.shards, part.total_samples) == (("00000.tar", "00003.tar"), 6)
    assert [sample["txt"] for sample in part.read_samples(1)] == [b"text 0", b"text 1", b"text 2"]
    assert set(stream_of(f"{path}/{{00001,00003}}.tar")) == {"fine"}
    for wrong in ("{00003..00005}.tar", "{00001.tar"):
        with pytest.raises(UserError, match=r"'00004\.tar' is not there, nor|brace is not closed"):
            index(IndexConfig(path=f"{path}/{wrong}"))
        with pytest.raises(UserError, match=r"'00004\.tar' is not there, nor|brace is not closed"):
            Manifest.load(f"{path}/{wrong}")


def test_parquet_files_of_different_columns_are_refused_by_name(tmp_path, in_process):
    files = {
        "0.parquet": parquet(image=[picture(0)], caption=["x"]),
        "1.parquet": parquet(jpg=[picture(1)], text=["y"]),
    }
    put(files, tmp_path)
    with pytest.raises(
        UserError, match=r"1\.parquet' has no column 'image'; it has: jpg, text: index such files by them"
    ):
        index(IndexConfig(path=str(tmp_path)))
    put({"1.parquet": parquet(url=["u"], text=["y"])}, tmp_path)
    summary = index(IndexConfig(path=str(tmp_path)))
    assert summary["samples"] == 1
    assert "1.parquet' has no column 'image'" in summary["problems"][0]


def test_captions_that_cannot_be_told_are_refused(tmp_path, in_process):
    put({"0.parquet": parquet(image=[picture(0)], caption=[{"en": "x", "de": "y"}])}, tmp_path)
    with pytest.raises(UserError, match=r"holds en, de: name one, as caption_columns=\[caption\.en\]"):
        index(IndexConfig(path=str(tmp_path)))
    index(IndexConfig(path=str(tmp_path), caption_columns=("caption.de",)))
    assert Manifest.load(tmp_path).read_samples(0)[0]["txt"] == b"y"
    put({"0.parquet": parquet(image=[picture(0)], caption=[7])}, tmp_path)
    with pytest.raises(UserError, match="'caption' is int64, not text"):
        index(IndexConfig(path=str(tmp_path)))


def test_a_page_in_the_place_of_a_shard_is_said(tmp_path, in_process):
    put({"0.tar": b"<!DOCTYPE html><html>404</html>" + bytes(600)}, tmp_path)
    with pytest.raises(UserError, match=r"0\.tar' is not a whole tar.*; it is an HTML page"):
        index(IndexConfig(path=str(tmp_path)))


@pytest.mark.parametrize(("mode", "white"), [("F", 1.0), ("F", 255.0), ("I", 255), ("I", 65_535), ("I", 2**31 - 1)])
def test_deep_grey_is_scaled_to_what_its_values_reach(mode, white):
    grey = np.arange(256, dtype=np.float64).reshape(16, 16)
    values = grey / 255 * white
    file = io.BytesIO()
    Image.fromarray(values.round().astype(np.int32) if mode == "I" else values.astype(np.float32)).save(file, "TIFF")
    pixels = np.asarray(to_rgb(read_image({"tif": file.getvalue(), "txt": b"x"})))
    reached = white if white < 2**31 - 1 else 2**32 - 1
    assert np.abs(pixels[..., 0] - values / reached * 255).max() <= 1
    assert np.ptp(pixels, axis=2).max() == 0
