"""What is written to S3 is there whole or not at all, faults or not; and no path key makes a folder called "s3:"."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow.fs import FileSelector, FileType, FSSpecHandler, PyFileSystem
from safetensors.torch import load_file

from rayclip.cli import convert
from rayclip.config import ConvertConfig, IngestConfig
from rayclip.data.ingest import plan_shards, write_shard_of
from rayclip.data.sources import SOURCES
from rayclip.errors import UserError
from rayclip.io import s3 as s3_requests
from rayclip.io import storage
from rayclip.io.files import whole_file, write_json
from rayclip.io.latency import LatencyEstimator
from rayclip.io.paths import RemotePath, append, local_copy, matching, remove_tree, staged, storage_path
from rayclip.models.clip import CLIP
from rayclip.orchestration.batch.ingest_output import IngestOutput
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, open_complete
from rayclip.orchestration.cluster.connection import storage_environment
from rayclip.orchestration.cluster.ray_storage import S3FileSystem, ray_storage, train_result, upload_checkpoint
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.tracking import mlflow as tracking
from rayclip.tracking.registry import resolve_model
from rayclip.training.checkpoint import RunState, load_model, read_state, write_checkpoint

BUCKET = "s3://data"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(s3, request):
    """A folder in S3 of the test's own, whose requests go wrong now and then."""
    s3.rate, s3.slow_s, s3.commands = 0.1, 0.5, ("GET", "PUT", "POST")
    return storage_path(f"{BUCKET}/{request.node.name}")


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    torch.manual_seed(0)
    model = CLIP(tiny_config)
    config = {"name": "tiny", "model": tiny_config.model_dump(mode="json")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    write_checkpoint(tmp_path / "samples-000000000064", model, optimizer, RunState(64), config, {"score": 1.0})
    return tmp_path / "samples-000000000064"


def test_a_place_in_s3_answers_as_one_on_disk(folder, tmp_path):
    for place in (folder, tmp_path):
        assert not (place / "a").exists() and not (place / "a" / "b.json").is_file()
        write_json(place / "a" / "b.json", {"c": 1})
        write_json(place / "a.json", {"c": 2})
        assert append(place / "a" / "log", b"one\n") == 4 and append(place / "a" / "log", b"two\n") == 8
        assert (place / "a").is_dir() and not (place / "a").is_file() and (place / "a.json").is_file()
        assert sorted(child.name for child in place.iterdir()) == ["a", "a.json"]
        assert [found.name for found in matching(place, "*/*.json")] == ["b.json"]
        assert json.loads((place / "a" / "b.json").read_text()) == {"c": 1}
        assert (place / "a" / "b.json").parent.name == "a" and (place / "a.json").stem == "a"
        remove_tree(place / "a")
        assert not (place / "a").exists() and (place / "a.json").exists()


def test_what_goes_wrong_while_it_is_written_leaves_nothing(folder):
    with pytest.raises(ZeroDivisionError), whole_file(folder / "file") as target:
        target.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), staged(folder / "folder") as local:
        (local / "one").write_bytes(b"half")
        raise ZeroDivisionError
    assert not folder.exists()


def test_a_large_file_goes_up_in_parts_and_comes_down_in_ranges_with_faults(folder, tmp_path, s3, monkeypatch):
    monkeypatch.setattr(s3_requests, "_PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 2**20)
    s3.rate = 0.2
    data = np.random.default_rng(0).bytes(23 * 2**20 + 7)
    (tmp_path / "large").write_bytes(data)
    s3_requests.upload(tmp_path / "large", f"{folder}/large")
    storage.download(f"{folder}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_a_file_whose_bucket_is_not_there_or_that_keeps_failing_is_named(s3, tmp_path, monkeypatch):
    with pytest.raises(s3_requests.StorageError, match=r"'s3://nowhere/a' cannot be written: there is no such bucket"):
        storage.write_bytes("s3://nowhere/a", b"")
    monkeypatch.setattr(s3_requests, "_LONGEST_WAIT_S", 0.01)
    s3.rate, s3.commands = 1.0, ("PUT",)
    with pytest.raises(s3_requests.StorageError, match=r"'s3://data/never' cannot be reached after 7 attempts"):
        storage.write_bytes("s3://data/never", b"data")


def test_a_checkpoint_is_uploaded_with_its_state_last_and_restored_by_ray(folder, checkpoint, monkeypatch):
    import ray.train

    order, upload, asked = [], s3_requests.upload, []
    monkeypatch.setattr(s3_requests, "upload", lambda source, path: (order.append(source.name), upload(source, path)))
    there = folder / "checkpoints" / checkpoint.name
    given = upload_checkpoint(
        ray.train.Checkpoint.from_directory(str(checkpoint)), there, check=lambda: asked.append(len(order))
    )
    assert order[-1] == "state.json" and len(order) == 5
    assert asked == [0, 1, 2, 3, 4]
    assert read_state(there).samples_seen == 64
    with given.as_directory() as local, local_copy(there) as copy:
        for found in (Path(local), copy):
            assert {path.name: path.read_bytes() for path in found.iterdir()} == {
                path.name: path.read_bytes() for path in checkpoint.iterdir()
            }


def test_rays_storage_names_the_run_and_holds_no_secret(folder, s3):
    import pickle

    arguments = ray_storage(folder / "checkpoints")
    assert arguments["name"] == "checkpoints" and arguments["storage_path"] == folder.key
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(arguments)
    with pytest.raises(RuntimeError, match="doesn't exist"):
        train_result(folder / "checkpoints")
    assert RunFolder(folder).read_record() is None and RunFolder(folder).read_summary() is None


def test_pyarrow_reads_and_writes_through_the_same_requests(folder):
    filesystem = PyFileSystem(FSSpecHandler(S3FileSystem()))
    with filesystem.open_output_stream(f"{folder.key}/a/b") as stream:
        stream.write(b"content")
    with filesystem.open_input_stream(f"{folder.key}/a/b") as stream:
        assert stream.read() == b"content"
    types = {info.path: info.type for info in filesystem.get_file_info([f"{folder.key}/a", f"{folder.key}/none"])}
    assert types == {f"{folder.key}/a": FileType.Directory, f"{folder.key}/none": FileType.NotFound}
    assert [info.path for info in filesystem.get_file_info(FileSelector(folder.key))] == [f"{folder.key}/a"]
    everything = {info.path for info in filesystem.get_file_info(FileSelector(folder.key, recursive=True))}
    assert everything == {f"{folder.key}/a", f"{folder.key}/a/b"}
    assert filesystem == PyFileSystem(FSSpecHandler(S3FileSystem()))
    with pytest.raises(PermissionError, match="bucket 'data' is not to be deleted"):
        filesystem.delete_dir("data")
    filesystem.delete_dir(f"{folder.key}/a")
    assert not folder.exists()


def test_weights_go_to_s3_and_come_back_in_every_format(folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with staged(folder / "run") as local:
        for path in checkpoint.iterdir():
            (local / path.name).write_bytes(path.read_bytes())
    source = f"{folder}/run"
    expected = load_file(checkpoint / "model.safetensors")
    for kind in ("open_clip", "huggingface", "rayclip"):
        output = f"{folder}/{kind}"
        assert convert.main(ConvertConfig(input=source, output=output, format=kind))["output"] == output
        got = load_model(resolve_model(output, None).folder).state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        with pytest.raises(UserError, match=f"'{output}' exists"):
            convert.main(ConvertConfig(input=source, output=output, format=kind))
        source = output
    found = resolve_model(f"{folder}/run", None)
    assert not (found.folder / "optimizer.safetensors").exists(), "what only training needs is not fetched"
    with pytest.raises(UserError, match=r"no model at 's3://.*/none': it has no model.safetensors"):
        resolve_model(f"{folder}/none", None)
    assert not Path("s3:").exists()


def test_parts_of_an_output_go_on_in_s3(folder):
    identity = {"kind": "embed", "settings": 1}
    tally = {"rows": {"samples": 2, "bad": 0}, "causes": {}}
    parts = PartitionedOutput(folder, identity, 2)
    parts.check()
    with parts.writing():
        parts.write(0, Part(pa.table({"a": [1, 2]}), tally))
        assert parts.missing() == ([1], tally)
        assert parts.read_summary() is None
        parts.write(1, Part(pa.table({"a": [3]}), tally))
        parts.finish({"parts": 2})
    assert open_complete(folder, "embed")[1] == {"parts": 2}
    with pytest.raises(UserError, match="other settings"):
        PartitionedOutput(folder, {"kind": "embed", "settings": 2}, 2).check()


def test_a_data_set_is_ingested_to_s3_and_goes_on_after_a_crash(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = {"kind": "digits", "size": 16}
    config = IngestConfig(source=source, output=str(folder), shard_samples=600)
    splits = SOURCES["digits"].splits(config.source, tmp_path)
    tasks = plan_shards(config, splits)
    output = IngestOutput.unlisted(config).listed(splits, tasks)
    with output.writing():
        output.write(0, write_shard_of(config, tasks[0]))
        assert output.read_summary() is None
    output.check()
    with output.writing():
        missing = output.missing()[0]
        assert missing == list(range(1, len(tasks)))
        for number in missing:
            output.write(number, write_shard_of(config, tasks[number]))
        in_s3 = output.finish(output.missing()[1])
    assert output.read_summary() == in_s3
    on_disk = config.model_copy(update={"output": str(tmp_path / "disk")})
    output = IngestOutput.unlisted(on_disk).listed(splits, tasks)
    with output.writing():
        for number, task in enumerate(tasks):
            output.write(number, write_shard_of(on_disk, task))
        assert output.finish(output.missing()[1])["splits"] == in_s3["splits"]


def test_mlflow_keeps_files_in_s3_and_says_where(s3, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = tracking.open_run(uri, "kept", "first", {"a": 1}, {}, None, artifacts=f"{BUCKET}/artifacts")
    assert [file.name for file in storage.list_files(f"{BUCKET}/artifacts/kept")] == [f"{run_id}/artifacts/config.json"]
    with pytest.raises(UserError, match="experiment 'kept' keeps its files at 's3://data/artifacts/kept', not at"):
        tracking.open_run(uri, "kept", "second", {}, {}, None, artifacts=f"{BUCKET}/elsewhere")
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in (tmp_path / "mlflow.db").read_bytes()


def test_workers_are_told_where_s3_is_and_no_secret(s3, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret")
    assert storage_environment() == {"AWS_ENDPOINT_URL": s3.url, "AWS_DEFAULT_REGION": "us-east-1"}


def test_a_place_in_s3_is_refused_by_what_knows_disks_alone():
    for use in (open, os.fspath, Path):
        with pytest.raises(TypeError):
            use(RemotePath("s3://bucket/key"))


def test_a_request_is_late_when_it_takes_longer_than_nearly_all():
    pace = LatencyEstimator()
    assert pace.timeout_s(100, 1.0) == 1.0, "nothing to go by"
    for _ in range(100):
        pace.add(0.2, 0)
    assert pace.timeout_s(0, 9.0) == pytest.approx(0.2, abs=0.01)
    assert pace.timeout_s(2**20, 9.0) == pytest.approx(0.4, abs=0.02)
    assert pace.timeout_s(0, 0.05) == 0.05
    pace.add(3.0, 0)
    assert pace.timeout_s(0, 9.0) > 1.0


def test_no_setting_is_taken_for_a_path_on_disk_but_by_what_reads_disks_alone(s3):
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("jobs", "serve", "platform/rayclip")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bPath\((str\()?(self\._?)?config\.|\bPath\((run|source|output|weights)\)", path.read_text())
    }
    # The keys of a service are a file of its machine, as a mounted secret is.
    sources = {"platform/rayclip/data/sources/folder.py", "platform/rayclip/data/sources/table.py"}
    assert found == sources | {"serve/middleware/auth.py"}
    for kind in ("folder", "table"):
        config = IngestConfig(source={"kind": kind, "path": f"{BUCKET}/pairs"}, output="unused")
        with pytest.raises(UserError, match=f"source.path '{BUCKET}/pairs' is not a"):
            SOURCES[kind].splits(config.source, Path("unused"))
