"""Tar shards and their manifest: what others write is read the same, and what is damaged is told."""

import io
import itertools
import tarfile
import tempfile

import pytest

from rayclip.config import IndexConfig
from rayclip.data.formats import Layout, Shard
from rayclip.data.formats.tar import (
    Span,
    _files,
    _plain_files,
    list_chunks,
    list_whole_chunks,
    read_samples,
    split_name,
    write_shard,
)
from rayclip.data.index import index_shard
from rayclip.data.index_plan import make_plan
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError


def make_samples(count, size=700):
    return [
        {"__key__": f"{i:06}".encode(), "png": bytes([i % 256]) * (size + i), "txt": f"number {i}".encode()}
        for i in range(count)
    ]


def make_tar(files, fmt=tarfile.USTAR_FORMAT, mtime=0):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=fmt) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return target.getvalue()


def read_by_chunks(data, chunk_size):
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        spans = list_chunks(Shard(file.name, len(data)), chunk_size, Layout())
    return [read_samples(data[span.offset : span.offset + span.length]) for span in spans], spans


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10, 64])
def test_what_is_written_is_read_by_chunks(chunk_size):
    samples, target = make_samples(10), io.BytesIO()
    spans = write_shard(target, samples, chunk_size)
    chunks, listed = read_by_chunks(target.getvalue(), chunk_size)
    assert listed == spans
    assert [sample for chunk in chunks for sample in chunk] == samples
    assert [len(chunk) for chunk in chunks] == [span.num_samples for span in spans]


def test_the_same_samples_give_the_same_bytes():
    targets = [io.BytesIO(), io.BytesIO()]
    for target in targets:
        write_shard(target, make_samples(5), 2)
    assert targets[0].getvalue() == targets[1].getvalue()


def test_an_empty_shard():
    target = io.BytesIO()
    assert write_shard(target, [], 4) == []
    assert read_by_chunks(target.getvalue(), 4) == ([], [])


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_long_and_foreign_names(fmt):
    long = "folder/" + "x" * 150
    files = [(f"{long}{i}/ünï.{ext}", f"{i}{ext}".encode()) for i in range(5) for ext in ("png", "txt")]
    chunks, spans = read_by_chunks(make_tar(files, fmt), 2)
    assert [span.num_samples for span in spans] == [2, 2, 1]
    samples = [sample for chunk in chunks for sample in chunk]
    assert [sample["__key__"].decode() for sample in samples] == [f"{long}{i}/ünï" for i in range(5)]
    assert samples[3]["txt"] == b"3txt"


def by_webdataset(files):
    webdataset, target = pytest.importorskip("webdataset"), io.BytesIO()
    with webdataset.TarWriter(target, encoder=False) as writer:
        for name, data in files:
            key, _, extension = name.rpartition(".")
            writer.write({"__key__": key, extension: data})
    return target.getvalue()


def one_chunk(data):
    """The bytes up to the last file's end, and (name, start, size) of each file, by tarfile."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    return data[: -(-(files[-1][1] + files[-1][2]) // 512) * 512], files


NAMES = {
    "plain": "a/000001.jpg",
    "prefix": "x" * 90 + "/" + "y" * 60 + ".jpg",
    "long": "z/" + "x" * 300 + ".jpg",
    "foreign": "schön/日本語.jpg",
}
WRITERS = {
    "ustar": make_tar,
    "pax": lambda files: make_tar(files, tarfile.PAX_FORMAT),
    "pax with times": lambda files: make_tar(files, tarfile.PAX_FORMAT, mtime=1.5),
    "gnu": lambda files: make_tar(files, tarfile.GNU_FORMAT),
    "webdataset": by_webdataset,
}


PAIRS = [pair for pair in itertools.product(WRITERS, NAMES) if pair != ("ustar", "long")]  # it has no room for it


@pytest.mark.parametrize(("writer", "kind"), PAIRS)
def test_the_quick_way_reads_what_tarfile_reads(writer, kind):
    files = [(f"{row}/{NAMES[kind]}", bytes([row]) * size) for row, size in enumerate((0, 1, 511, 512, 513, 5000))]
    chunk, expected = one_chunk(WRITERS[writer](files))
    assert list(_files(chunk)) == expected
    if writer == "gnu" and kind in ("prefix", "long"):
        assert _plain_files(chunk) is None
    else:
        assert _plain_files(chunk) == expected
    assert [sample["jpg"] for sample in read_samples(chunk)] == [data for _, data in files]


def outcome(read):
    try:
        return list(read())
    except tarfile.TarError as error:
        return str(error)


@pytest.mark.parametrize("writer", ["ustar", "pax with times"])
def test_a_header_with_a_wrong_byte_is_read_as_tarfile_reads_it(writer):
    chunk, files = one_chunk(WRITERS[writer]([("000001.jpg", b"one" * 300), ("000001.txt", b"a dog")]))
    for at in range(files[0][1] + 512 * 2, files[1][1]):
        for change in (1, 0x80):
            wrong = bytearray(chunk)
            wrong[at] ^= change
            wrong = bytes(wrong)
            plain = _plain_files(wrong)
            assert plain is None or plain == outcome(lambda data=wrong: _files(data))


def test_folders_and_links_in_a_tar_are_no_samples():
    files = [("a/", None), ("a/0.png", b"0"), ("a/0.txt", b"zero"), ("b/", None), ("b/1.png", b"1"), ("c/", None)]
    chunks, spans = read_by_chunks(make_tar(files), 1)
    assert [sample["__key__"] for chunk in chunks for sample in chunk] == [b"a/0", b"b/1"]
    assert sum(span.length for span in spans) == 512 * 9


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("000001.png", ("000001", "png")),
        ("a.b/000001.seg.PNG", ("a.b/000001", "seg.png")),
        ("x/plain", ("x/plain", "")),
        (".hidden", (".hidden", "hidden")),
        ("./000001.jpg", ("000001", "jpg")),
        ("a/./b//c.d.jpg", ("a/b/c", "d.jpg")),
        ("a/.hidden.txt", ("a/.hidden.txt", "hidden.txt")),
    ],
)
def test_split_name(name, parts):
    assert split_name(name) == parts


@pytest.mark.parametrize("cut", range(0, 26_000, 300))
def test_a_tar_cut_anywhere_is_told(tmp_path, cut):
    target = io.BytesIO()
    write_shard(target, make_samples(10), 4)
    shard = tmp_path / "half.tar"
    shard.write_bytes(target.getvalue()[:cut])
    with pytest.raises(UserError, match=r"half\.tar' is not a whole tar"):
        index_shard(Shard(str(shard), cut), 4, Layout())
    salvaged, problem = list_whole_chunks(Shard(str(shard), cut), 4, Layout())[:2]
    assert "not a whole tar" in problem
    kept = [sample for span in salvaged for sample in read_samples(shard.read_bytes()[span.offset :][: span.length])]
    assert kept == make_samples(10)[: len(kept)]
    assert len(kept) >= cut // 2700 - 1


def test_no_tar_at_all(tmp_path):
    (tmp_path / "text.tar").write_text("not a tar " * 200)
    with pytest.raises(UserError, match=r"text\.tar"):
        index_shard(Shard(str(tmp_path / "text.tar"), 2200), 4, Layout())
    (tmp_path / "notes.md").write_text("nothing to train on")
    (tmp_path / "text.tar").unlink()
    with pytest.raises(UserError, match="has no shards"):
        make_plan(IndexConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="is not a folder"):
        make_plan(IndexConfig(path=str(tmp_path / "missing")))


def test_a_chunk_cut_inside_a_file_raises():
    target = io.BytesIO()
    (span,) = write_shard(target, make_samples(3), 64)
    with pytest.raises(tarfile.TarError):
        read_samples(target.getvalue()[: span.length - 1024 - 300])


def write_manifest(folder):
    shards = []
    for name in ("a.tar", "b.tar"):
        with (folder / name).open("wb") as target:
            spans = write_shard(target, make_samples(7), 3)
        shards.append((name, (folder / name).stat().st_size, spans))
    manifest = Manifest.from_spans(folder, shards)
    manifest.save()
    return manifest


def test_a_manifest_is_read_back_the_same(tmp_path):
    manifest, loaded = write_manifest(tmp_path), Manifest.load(tmp_path)
    assert loaded.digest == manifest.digest
    assert loaded.total_samples == 14
    assert len(loaded) == 6
    assert [sample["txt"] for sample in read_samples(loaded.read_chunk(5))] == [b"number 6"]
    loaded.check_shards()


def test_a_shard_that_changed_under_its_manifest(tmp_path):
    manifest = write_manifest(tmp_path)
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:6000])
    with pytest.raises(UserError, match="index it again"):
        manifest.check_shards()
    with pytest.raises(OSError, match="ends inside a chunk"):
        manifest.read_chunk(5)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(UserError, match="not there"):
        manifest.check_shards()


def test_manifests_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(UserError, match="rayclip index"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a rayclip manifest"):
        Manifest.load(tmp_path)
    Manifest.from_spans(tmp_path, [("a.tar", 10_240, [])]).save()
    with pytest.raises(UserError, match="empty"):
        Manifest.load(tmp_path)


def test_order_of_shards_is_part_of_the_identity():
    one = [("a.tar", 9, [Span(0, 1, 1)]), ("b.tar", 9, [Span(0, 1, 1)])]
    assert Manifest.from_spans("x", one).digest != Manifest.from_spans("x", one[::-1]).digest


@pytest.mark.peers
def test_shards_of_the_webdataset_library_read_equal(tmp_path):
    wds = pytest.importorskip("webdataset")
    samples = make_samples(20)
    with wds.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for sample in samples:
            writer.write({**sample, "__key__": sample["__key__"].decode()})
    data = (tmp_path / "theirs.tar").read_bytes()
    chunks, _ = read_by_chunks(data, 8)
    assert [sample for chunk in chunks for sample in chunk] == samples
    assert index_shard(Shard(str(tmp_path / "theirs.tar"), len(data)), 8, Layout())


@pytest.mark.peers
def test_the_webdataset_library_reads_ours_equal(tmp_path):
    wds = pytest.importorskip("webdataset")
    samples = make_samples(20)
    with (tmp_path / "ours.tar").open("wb") as target:
        write_shard(target, samples, 8)
    theirs = list(wds.WebDataset(str(tmp_path / "ours.tar"), shardshuffle=False))
    assert [{k: v for k, v in s.items() if k in ("png", "txt")} for s in theirs] == [
        {k: v for k, v in s.items() if k != "__key__"} for s in samples
    ]
