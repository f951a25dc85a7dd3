"""Data on a web server, the Hugging Face Hub and Google's store, each on loopback: the pairs that lie there."""

import asyncio
import csv
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from safetensors.torch import save_file

from rayclip.config import EmbedConfig, IndexConfig
from rayclip.config.loader import load, load_from_python
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.io import read_only, storage
from rayclip.io.paths import storage_path
from rayclip.io.s3 import StorageError
from rayclip.models.clip import CLIP
from rayclip.orchestration.batch.index import index
from rayclip.tracking.registry import resolve_model

NUM_SAMPLES = 24


@contextmanager
def serving(application):
    """A web application on loopback, on a thread; its address."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(application)

    async def start():
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_samples, write_dataset):
    """Shards, a table that names pictures by path, a table in Parquet; without a manifest."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "shards", make_samples(NUM_SAMPLES), shard_samples=12)
    (folder / "shards" / "manifest.parquet").unlink()
    (folder / "tables" / "pictures").mkdir(parents=True)
    with (folder / "tables" / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "title"])
        for sample in make_samples(NUM_SAMPLES):
            name = f"pictures/{sample['__key__'].decode()}.png"
            (folder / "tables" / name).write_bytes(sample["png"])
            rows.writerow([name, sample["txt"].decode()])
    columns = {"image": [s["png"] for s in make_samples(NUM_SAMPLES)], "caption": captions_of(make_samples)}
    pq.write_table(pa.table(columns), folder / "tables" / "pairs.parquet", row_group_size=8)
    return folder


def captions_of(make_samples):
    return [sample["txt"].decode() for sample in make_samples(NUM_SAMPLES)]


@pytest.fixture
def in_process(monkeypatch):
    """Tasks one after another in this process, in the place of a cluster's."""
    monkeypatch.setattr("rayclip.orchestration.batch.index.run_tasks", lambda tasks, make, **_: map(make(), tasks))


@pytest.fixture(scope="module")
def website(folder):
    application = web.Application()
    application.router.add_static("/data", folder, show_index=True)
    with serving(application) as address:
        yield f"{address}/data"


def check_pairs(path, output, make_samples, **changes):
    """Index what lies at a path, and read all of it as training does."""
    summary = index(IndexConfig(path=path, output=str(output), chunk_samples=5, **changes))
    manifest = Manifest.load(output)
    manifest.check_shards()
    assert manifest.is_remote()
    samples = [sample for chunk in range(len(manifest)) for sample in manifest.read_samples(chunk)]
    assert summary["samples"] == NUM_SAMPLES
    assert [sample["txt"].decode() for sample in samples] == captions_of(make_samples)
    images = [sample.get("png") or sample["jpg"] for sample in samples]
    assert images == [sample["png"] for sample in make_samples(NUM_SAMPLES)]
    again = index(IndexConfig(path=path, output=str(output), chunk_samples=5, **changes))
    assert (again["read"], again["digest"]) == (0, manifest.digest)


@pytest.mark.parametrize(
    "path", ["shards", "shards/{000000..000001}.tar", "shards/*.tar", "tables/pairs.csv", "tables/pairs.parquet"]
)
def test_a_web_servers_files_are_read_in_parts(path, website, tmp_path, make_samples, in_process):
    check_pairs(f"{website}/{path}", tmp_path / "index", make_samples)


def test_pictures_may_be_anywhere_on_the_web(website, tmp_path, make_samples, in_process):
    urls = [f"{website}/tables/pictures/{sample['__key__'].decode()}.png" for sample in make_samples(3)]
    pq.write_table(pa.table({"url": [*urls, f"{website}/no.png"], "caption": list("abcd")}), tmp_path / "t.parquet")
    summary = index(IndexConfig(path=str(tmp_path), image_column="url"))
    found = Manifest.load(tmp_path).read_samples(0)
    assert [sample.get("png") for sample in found] == [*(sample["png"] for sample in make_samples(3)), None]
    assert (summary["samples"], summary["unreadable"]) == (4, {"no_image": 1})


@pytest.mark.parametrize("path", ["", "/model.safetensors"])
def test_weights_are_copied_from_there_once(path, website, folder, tmp_path, monkeypatch, tiny_config):
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path))
    (folder / "model").mkdir(exist_ok=True)
    model = CLIP(tiny_config)
    save_file(model.state_dict(), folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps({"model": tiny_config.model_dump(mode="json")}))
    source = resolve_model(f"{website}/model{path}", None)
    assert source.folder.is_relative_to(tmp_path)
    weights = source.folder if path else source.folder / "model.safetensors"
    assert weights.read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
    assert resolve_model(f"{website}/model{path}", None) == source


def test_what_is_not_there_or_not_to_be_read_is_one_line(website, tmp_path):
    for path, line in {
        f"{website}/shards/{{000000..000002}}.tar": "'000002.tar' is not there",
        f"{website}/nothing": "has no shards",
    }.items():
        with pytest.raises(UserError, match=line):
            index(IndexConfig(path=path, output=str(tmp_path)))

    async def forbid(request):
        raise web.HTTPForbidden

    async def whole(request):
        return web.Response(body=b"x" * 5000, content_type="application/x-tar")

    application = web.Application()
    application.router.add_get("/private.tar", forbid)
    application.router.add_get("/whole.tar", whole)
    with serving(application) as address:
        with pytest.raises(PermissionError, match=r"private\.tar' may not be read: the store answers 403"):
            storage.read_bytes(f"{address}/private.tar")
        with pytest.raises(StorageError, match="the server does not send parts of files"):
            storage.find_file(f"{address}/whole.tar")


def hub(folder):
    """As much of the Hub's API as reading takes, with one data set."""

    def entry(path):
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "oid": "0", "path": name}
        return {
            "type": "file",
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
            "path": name,
        }

    async def info(request):
        return web.json_response({"_id": "0", "id": "us/pairs", "sha": "1" * 40, "private": False, "tags": []})

    async def tree(request):
        there = folder / request.match_info["path"]
        if not there.is_dir():
            return web.json_response({"error": "not there"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        return web.json_response([entry(path) for path in sorted(there.iterdir())])

    async def content(request):
        return web.FileResponse(folder / request.match_info["path"])

    application = web.Application()
    application.router.add_get("/api/datasets/us/pairs", info)
    application.router.add_get("/api/datasets/us/pairs/revision/{revision}", info)
    application.router.add_get("/api/datasets/us/pairs/tree/{revision}", tree_of_all(tree))
    application.router.add_get("/api/datasets/us/pairs/tree/{revision}/{path:.*}", tree)
    application.router.add_get("/datasets/us/pairs/resolve/{revision}/{path:.*}", content)
    return application


def tree_of_all(tree):
    async def answer(request):
        request.match_info["path"] = ""
        return await tree(request)

    return answer


@pytest.fixture
def fresh_clients():
    """Clients that are made by the test, which read its environment, and are not there after it."""
    read_only._client.cache_clear()
    yield
    read_only._client.cache_clear()


def test_the_hubs_files_are_read_in_parts(folder, tmp_path, make_samples, in_process, monkeypatch, fresh_clients):
    with serving(hub(folder)) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        for number, path in enumerate(("shards/*.tar", "shards/{000000..000001}.tar", "tables/pairs.parquet")):
            check_pairs(f"hf://datasets/us/pairs/{path}", tmp_path / str(number), make_samples)


def test_googles_files_are_read_in_parts(folder, tmp_path, make_samples, in_process, monkeypatch, fresh_clients):
    server_module = pytest.importorskip("gcp_storage_emulator.server")
    gcsfs = pytest.importorskip("gcsfs")
    # The JSON API alone: of the kind of a bucket its library asks by gRPC, which the emulator does not speak.
    fsspec.register_implementation("gs", gcsfs.core.GCSFileSystem, clobber=True)
    # By itself it answers one connection after another, and clients keep theirs open.
    monkeypatch.setattr(server_module.server, "HTTPServer", ThreadingHTTPServer)
    server = server_module.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
        client = gcsfs.core.GCSFileSystem(token="anon", skip_instance_cache=True)
        for file in sorted((folder / "shards").iterdir()):
            client.pipe_file(f"bucket/shards/{file.name}", file.read_bytes())
        for number, path in enumerate(("shards", "shards/{000000..000001}.tar", "shards/*.tar")):
            check_pairs(f"gs://bucket/{path}", tmp_path / str(number), make_samples)
    finally:
        server.stop()


def test_azure_is_read_through_its_library(monkeypatch, fresh_clients):
    adlfs = pytest.importorskip("adlfs")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "ours")
    storage.absolute("az://container/folder")
    client = read_only._client("az", 0)
    assert isinstance(client, adlfs.AzureBlobFileSystem)
    assert client.account_name == "ours"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("gs://b/d", r"'gs://b/d': gs:// needs gcsfs: pip install 'rayclip\[gcs\]'"),
        ("az://b/d", r"az:// needs adlfs: pip install 'rayclip\[azure\]'"),
        ("hf://datasets/o/d", r"hf:// needs huggingface_hub: pip install 'rayclip\[hf\]'"),
    ],
)
def test_without_its_extra_a_store_is_refused_with_the_extras_name(path, line, monkeypatch):
    monkeypatch.setattr(read_only, "find_spec", lambda package: None)
    for read in (lambda: storage_path(path), lambda: load(EmbedConfig, None, ["model=m", f"data={path}", "output=o"])):
        with pytest.raises(UserError, match=line):
            read()


def test_writing_there_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match="output: 'gs://b/o': gs:// is read, not written to: give a path on disk"):
        load(EmbedConfig, None, ["model=m", "data=/d", "output=gs://b/o"])
    with pytest.raises(UserError, match="output: 'https://h/o': https:// is read, not written to"):
        load_from_python(IndexConfig, {"path": "/d", "output": "https://h/o"}, {})
    with pytest.raises(UserError, match=r"give output=FOLDER, where the manifest goes"):
        index(IndexConfig(path="https://h/d/{0..9}.tar"))
    with pytest.raises(UserError, match="is read, not written to"):
        storage.write_bytes("hf://datasets/o/d/x", b"")
