"""Ingest and index as jobs, killed on purpose and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from rayclip.cli import index as index_job
from rayclip.cli import ingest as ingest_job
from rayclip.config import FolderConfig, IndexConfig, IngestConfig
from rayclip.data.ingest import content_of, plan_shards, write_shard_of
from rayclip.data.manifest import Manifest
from rayclip.data.sources import SOURCES
from rayclip.errors import UserError
from rayclip.orchestration.batch.ingest_output import STATE, IngestOutput

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Pictures that take a while to shrink, one of them broken."""
    folder = tmp_path_factory.mktemp("source")
    Image.effect_noise((1200, 1200), 50).convert("RGB").save(folder / "000.jpg", quality=90)
    for i in range(160):
        if i:
            os.link(folder / "000.jpg", folder / f"{i:03}.jpg")
        (folder / f"{i:03}.txt").write_text(f"noise {i}")
    (folder / "007.jpg").unlink()
    (folder / "007.jpg").write_bytes(b"broken")
    return folder


def config_of(source, output):
    return IngestConfig(
        source=FolderConfig(path=str(source)), output=str(output), shard_samples=8, chunk_samples=3, shorter_side=32
    )


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What plain functions write."""
    config = config_of(source, tmp_path_factory.mktemp("whole") / "out")
    splits = SOURCES["folder"].splits(config.source, None)
    tasks = plan_shards(config, splits)
    output = IngestOutput.unlisted(config).listed(splits, tasks, content_of(config, splits))
    with output.writing():
        for number, task in enumerate(tasks):
            output.write(number, write_shard_of(config, task))
        output.finish({})
    return files_of(config.output)


def files_of(folder):
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.chaos
def test_killed_midway_and_started_again_ends_with_the_same_bytes(source, whole, tmp_path):
    config = config_of(source, tmp_path / "out")
    (tmp_path / "config.yaml").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "jobs.ingest", str(tmp_path / "config.yaml")]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "out" / STATE / "train"
    try:
        deadline = time.monotonic() + 120
        while len(list(records.glob("*.json"))) < 3:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    time.sleep(2)  # tasks of the dead driver end
    written = {path.stem: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 3 <= len(written) < 20
    shards = {stem: (tmp_path / "out/train" / f"{stem}.tar").stat().st_mtime_ns for stem in written}

    summary = ingest_job.main(config)

    assert not summary["complete"]
    assert files_of(config.output) == whole
    after = {stem: (tmp_path / "out/train" / f"{stem}.tar").stat().st_mtime_ns for stem in written}
    assert after == shards, "finished shards are not written again"


def test_a_run_its_report_and_a_second_run(source, whole, tmp_path, capsys):
    config = config_of(source, tmp_path / "out")
    summary = ingest_job.main(config)
    assert files_of(config.output) == whole
    assert summary["splits"]["train"]["samples"] == 159
    assert summary["splits"]["train"]["skipped"] == {"image_undecodable": 1}
    again = ingest_job.main(config)
    assert again["complete"]
    assert again["splits"] == summary["splits"]
    assert "was complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="other settings"):
        ingest_job.main(config.model_copy(update={"seed": 5}))


def test_too_many_bad_pairs_end_the_run_with_one_line(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"broken")
        (tmp_path / f"{i}.txt").write_text("a picture")
    with pytest.raises(UserError, match="4 of 4 samples cannot be used") as caught:
        ingest_job.main(config_of(tmp_path, tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_index_gives_the_manifest_that_ingest_wrote(source, whole, tmp_path):
    for name, data in whole.items():
        if name.startswith("train/") and name.endswith(".tar"):
            (tmp_path / Path(name).name).write_bytes(data)
    (tmp_path / "manifest-of-ingest").mkdir()
    (tmp_path / "manifest-of-ingest/manifest.parquet").write_bytes(whole["train/manifest.parquet"])
    summary = index_job.main(IndexConfig(path=str(tmp_path), chunk_samples=3))
    assert summary["samples"] == 159
    assert Manifest.load(tmp_path).digest == Manifest.load(tmp_path / "manifest-of-ingest").digest


def test_index_names_the_file_that_is_no_tar(whole, tmp_path):
    with pytest.raises(UserError, match="is not a folder with files in it"):
        index_job.main(IndexConfig(path=str(tmp_path)))
    (tmp_path / "good.tar").write_bytes(whole["train/000000.tar"])
    (tmp_path / "half.tar").write_bytes(whole["train/000001.tar"][:5000])
    with pytest.raises(UserError, match=r"half\.tar' is not a whole tar"):
        index_job.main(IndexConfig(path=str(tmp_path)))
    assert not (tmp_path / "manifest.parquet").exists()
