"""Curation as a job: a data set with known copies, made anew, and gone on with."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.workload import jpegs
from rayclip.cli import curate as job
from rayclip.config import CurateConfig, WorkersConfig
from rayclip.data.formats.tar import read_samples
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError

COPIES = {30: 3, 31: 3, 32: 7}
"""Samples that have the picture of an earlier one."""


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_dataset):
    images = jpegs(96, 40)
    samples = []
    for i in range(40):
        caption = "a lighthouse by the sea" if i % 2 else "a teapot on the table"
        image = images[COPIES.get(i, i)]
        samples.append({"__key__": f"{i:03}".encode(), "jpg": image, "txt": caption.encode(), "json": b"{}"})
    del samples[5]["txt"]
    samples[6]["jpg"] = samples[6]["jpg"][:200]
    samples[8]["txt"] = b"x"
    folder = tmp_path_factory.mktemp("curate")
    write_dataset(folder / "old", samples, shard_samples=15, chunk_samples=4)
    (folder / "queries.txt").write_text("lighthouse\nteapot\n")
    return folder, samples


def config_of(folder, output, **changes):
    return CurateConfig(
        data=str(folder / "old"), output=str(folder / output), queries=str(folder / "queries.txt"), part_samples=12,
        chunk_samples=4, max_bad_fraction=0.1, cluster=WorkersConfig(num_workers=2), **changes,
    )  # fmt: skip


def test_the_new_data_set_has_what_stays_and_all_else_has_its_cause(source):
    folder, samples = source
    summary = job.main(config_of(folder, "new"))
    dropped = {5: "no_caption", 6: "image_undecodable", 8: "caption_short"} | dict.fromkeys(COPIES, "duplicate_exact")
    assert summary["outcomes"]["kept"] == summary["kept"] == 40 - len(dropped)
    assert sum(summary["outcomes"].values()) == summary["samples"] == 40

    manifest = Manifest.load(folder / "new")
    manifest.check_shards()
    new = [sample for chunk in range(len(manifest)) for sample in read_samples(manifest.read_chunk(chunk))]
    left = [sample for i, sample in enumerate(samples) if i not in dropped]
    assert [{k: v for k, v in s.items() if k != "__key__"} for s in new] == [
        {k: v for k, v in s.items() if k != "__key__"} for s in left
    ]
    parts = sorted((folder / "new" / "outcomes").glob("part-*.parquet"))
    outcomes = [outcome for part in parts for outcome in pq.read_table(part)["outcome"].to_pylist()]
    assert outcomes == [dropped.get(i, "kept") for i in range(40)]
    queries = pq.read_table(folder / "new" / "queries.parquet").to_pylist()
    kept = [sample["txt"].decode() for sample in left]
    assert {q["query"]: q["after"] for q in queries} == {
        query: sum(query in caption for caption in kept) for query in ("lighthouse", "teapot")
    }
    assert (folder / "new" / "queries.png").stat().st_size > 1000

    # Interrupted after a part, it ends with the same bytes; other settings are refused there.
    shutil.copytree(folder / "new", folder / "again")
    for name in ("summary.json", "manifest.parquet", "000001.tar", "outcomes/part-000001.parquet"):
        (folder / "again" / name).unlink()
    (folder / "again" / "outcomes" / "summary.json").unlink()
    assert job.main(config_of(folder, "again"))["digest"] == summary["digest"]
    for shard in manifest.shards:
        assert (folder / "again" / shard).read_bytes() == (folder / "new" / shard).read_bytes()
    with pytest.raises(UserError, match="was made with other settings"):
        job.main(config_of(folder, "new", seed=1))
    assert json.loads((folder / "new" / "summary.json").read_text()) == job.main(config_of(folder, "new"))
    assert np.load(folder / "new" / "outcomes.npy").shape == (40,)
