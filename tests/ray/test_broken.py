"""A training on ten thousand samples of which one in twenty is broken or odd: it ends, and every count is exact."""

import json
from collections import Counter

import pytest
from mlflow import MlflowClient

from jobs import train as job
from rayclip.config import TrainConfig
from rayclip.data.manifest import Manifest
from rayclip.orchestration.run_folder import RunFolder
from tests.broken_corpus import CHUNK_SAMPLES, GONE, HALF, NUM_SAMPLES, SHARD_SAMPLES, SIDE, build_corpus

pytestmark = pytest.mark.slow


def test_ten_thousand_samples_with_all_that_can_be_wrong_are_counted_to_the_last(
    tmp_path, tiny_config, write_dataset, make_config, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    corpus = build_corpus()
    data = tmp_path / "data"
    write_dataset(data, corpus.samples, SHARD_SAMPLES, CHUNK_SAMPLES)
    check_shards = Manifest.check_shards

    def lose_two_shards_after(manifest):
        """What a full or failing disk does to a run that has begun."""
        check_shards(manifest)
        (data / f"{GONE:06}.tar").unlink()
        half = data / f"{HALF:06}.tar"
        half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])

    monkeypatch.setattr(Manifest, "check_shards", lose_two_shards_after)
    vision = tiny_config.vision.model_copy(update={"image_size": SIDE, "patch_size": SIDE // 2})
    config = make_config(
        "broken",
        data,
        model=tiny_config.model_copy(update={"vision": vision}).model_dump(mode="json"),
        data={"max_bad_fraction": 0.05},
        batch_size=250,
        epochs=1,
        checkpoint={"every_samples": 4000},
        cluster={"num_workers": 2},
    )
    summary = job.main(TrainConfig.model_validate(config))

    bad = corpus.bad()
    causes = Counter(cause for cause in corpus.causes if cause != "fine")
    assert causes.total() == bad.total() == 400
    assert summary["skipped"] == causes
    assert summary["samples_seen"] == NUM_SAMPLES - 400
    lines = [json.loads(line) for line in RunFolder(tmp_path / "runs/broken").quarantine.read_text().splitlines()]
    assert Counter((line["cause"], line["shard"], line["row"]) for line in lines) == bad
    metrics = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db").get_run(summary["mlflow_run_id"]).data.metrics
    assert {key: n for key, n in metrics.items() if key.startswith("skipped/")} == {
        f"skipped/{cause}": count for cause, count in causes.items()
    }
