"""A training on ten thousand samples of which one in twenty is broken or odd: it ends, and every count is exact."""

import json
from collections import Counter

import pytest
from mlflow import MlflowClient

from rayclip.cli import train as job
from rayclip.config import TrainConfig
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.orchestration.cluster.progress import ProgressLine
from rayclip.orchestration.train.driver import run_training, start_training
from rayclip.orchestration.train.run_folder import RunFolder
from tests.broken_corpus import CHUNK_SAMPLES, GONE, HALF, NUM_SAMPLES, SHARD_SAMPLES, SIDE, build_corpus


def test_ten_thousand_samples_with_all_that_can_be_wrong_are_counted_to_the_last(
    tmp_path, tiny_config, write_dataset, make_config, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    corpus = build_corpus()
    data = tmp_path / "data"
    write_dataset(data, corpus.samples, SHARD_SAMPLES, CHUNK_SAMPLES)
    check_shards = Manifest.check_shards

    def lose_two_shards_after(manifest, may_lack=False):
        """What a full or failing disk does to a run that has begun."""
        check_shards(manifest, may_lack)
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


@pytest.mark.chaos
def test_a_run_goes_on_where_a_shard_has_gone_since(tmp_path, make_samples, write_dataset, make_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, pairs = tmp_path / "data", tmp_path / "pairs"
    manifest = write_dataset(data, make_samples(120), shard_samples=30, chunk_samples=10)
    write_dataset(pairs, make_samples(20, seed=1))
    config = make_config(
        "gone",
        data,
        data={"max_bad_fraction": 0.4, "shuffle_window": 2},
        batch_size=20,
        epochs=2,
        evaluation={"every_samples": 60, "tasks": {"pairs": {"kind": "retrieval", "path": str(pairs)}}},
        cluster={"num_workers": 1},
    )
    training = start_training(TrainConfig.model_validate(config), ProgressLine, awaits_decision=True)
    assert next(filter(None, training))["samples_seen"] == 60
    training.close()
    shard = data / manifest.shards[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=f"'{shard}' has .* bytes, its manifest says"):
        run_training(TrainConfig.model_validate(config))
    shard.unlink()
    summary = run_training(TrainConfig.model_validate(config))

    lines = [json.loads(line) for line in RunFolder(tmp_path / "runs/gone").quarantine.read_text().splitlines()]
    assert {(line["cause"], line["shard"]) for line in lines} == {("chunk_unreadable", shard.name)}
    assert summary["skipped"] == {"chunk_unreadable": len(lines)}
    assert 30 <= len(lines) <= 60, "all of the second epoch's, and what the first had left"
    assert summary["samples_seen"] == 2 * 120 - len(lines)
    with pytest.raises(UserError, match=f"names shard '{shard.name}', which is not there"):
        run_training(TrainConfig.model_validate({**config, "name": "new"}))
