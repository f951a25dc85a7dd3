"""Runs that branch off another's checkpoint: a trunk in the tests' own process, a branch of it, and what is refused."""

import json
from collections import Counter

import numpy as np
import pytest
from mlflow import MlflowClient

from rayclip.cli import train as train_job
from rayclip.config import TrainConfig
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.orchestration.train.branch import find_checkpoint
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.scaling.experiment import read_experiment
from rayclip.training.checkpoint import read_state

NUM_SAMPLES, CHUNK, BATCH, FRACTION = 240, 10, 20, 0.5
POINTS = (95, 150)
TRUNK, TOTAL = 200, 260
"""Samples of the trunk, and of its branch: more than two passes over half of the data."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_samples, write_dataset):
    """Data to train on, and data to measure on; nothing in the first can't be read."""
    folder = tmp_path_factory.mktemp("branch")
    write_dataset(folder / "train", make_samples(NUM_SAMPLES), shard_samples=60, chunk_samples=CHUNK)
    write_dataset(folder / "pictures", make_samples(60, seed=1))
    (folder / "pictures" / "classnames.txt").write_text("one\ntwo\nthree\n")
    return folder


def branch_config(make_config, folders, name, **sections):
    tasks = {"classes": {"kind": "zero_shot", "path": str(folders / "pictures")}}
    values = {
        "data": {"fraction": FRACTION},
        "batch_size": BATCH,
        "ema": {"half_life_samples": 50},
        "optimizer": {"schedule": "wsd", "warmup_samples": 40},
        "checkpoint": {"every_samples": 40, "keep": 1, "record_samples": True},
        "evaluation": {"tasks": tasks},
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return make_config(name, folders / "train", **values)


@pytest.fixture(scope="module")
def trained(folders, make_config, tmp_path_factory):
    """(folder, summary of a trunk, summary of its branch, what the command line said of it)."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.chdir(folder)
        trunk = branch_config(
            make_config, folders, "trunk", samples=TRUNK, checkpoint={"at_samples": POINTS}, evaluation={"tasks": {}}
        )
        first = train_job.main(TrainConfig.model_validate(trunk))
        branch = branch_config(
            make_config,
            folders,
            "branch",
            samples=TOTAL,
            branch_from=f"runs/trunk@{POINTS[0]}",
            optimizer={"cooldown_samples": 80},
            cluster={"num_workers": 2},
            checkpoint={"keep": 9},
        )
        second = train_job.main(TrainConfig.model_validate(branch))
    return folder, first, second


def checkpoints(folder, name):
    return [path for path, _ in RunFolder(folder / "runs" / name).evaluated_checkpoints()]


def test_checkpoints_that_were_asked_for_are_not_deleted(trained):
    folder, *_ = trained
    kept = [read_state(path).samples_seen for path in checkpoints(folder, "trunk")]
    # The first ones at or after POINTS, and one more; 40, 80, 120 and 160 were deleted.
    assert kept == [100, 160, 200]
    on_disk = {path.name for path in (folder / "runs/trunk/checkpoints").glob("samples-*")}
    assert on_disk == {f"samples-{samples:012}" for samples in kept}


def test_a_branch_trains_what_its_trunk_would_have(trained, folders):
    """Trunk and branch together, every sample of the branch's stream once; and the batch is the same on two workers."""
    folder, _, second = trained
    before = np.load(checkpoints(folder, "trunk")[0] / "samples.npy")
    state = read_state(checkpoints(folder, "trunk")[0])
    after = [np.load(path / "samples.npy") for path in checkpoints(folder, "branch")]
    own = Counter(map(tuple, np.concatenate(after)[:, :2].tolist()))
    assert set(own.values()) == {1}
    assert own.total() == TOTAL - state.samples_seen == second["samples_trained"]

    half = Manifest.load(folders / "train").subset(FRACTION, 3)
    assert half.total_samples == NUM_SAMPLES * FRACTION
    whole = {(position, row) for position in range(TOTAL // CHUNK) for row in range(CHUNK)}
    cursor, partial = state.ledger["cursor"], state.ledger["partial"]
    done = {(p, row) for p in range(cursor) for row in range(CHUNK)}
    done |= {(int(p), row) for p, mask in partial.items() for row in range(CHUNK) if int(mask, 16) >> row & 1}
    assert len(done) == state.samples_seen
    assert set(map(tuple, before[:, :2].tolist())) <= done
    assert done | set(own) == whole and not done & set(own)


def test_a_branch_says_where_it_comes_from_and_what_it_took_itself(trained):
    folder, first, second = trained
    assert first["samples_trained"] == first["samples_seen"] == TRUNK
    assert second["samples_seen"] == TOTAL
    assert first["unique_samples"] == second["unique_samples"] == NUM_SAMPLES * FRACTION
    assert second["steps"] == TOTAL // BATCH
    took_s = second["samples_trained"] / second["samples_per_s"]
    assert second["train_time_s"] == pytest.approx(took_s, abs=0.06)  # it is given to a tenth of a second
    trunk, last = (read_state(checkpoints(folder, name)[-1]) for name in ("trunk", "branch"))
    assert last.branched_at == 100 and trunk.branched_at == 0

    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    run = client.get_run(second["mlflow_run_id"])
    assert run.data.tags["branched_from"] == str(checkpoints(folder, "trunk")[0])
    assert run.data.tags["branched_at"] == "100"
    steps = [point.step for point in client.get_metric_history(second["mlflow_run_id"], "train/loss")]
    assert min(steps) > 100 and max(steps) <= TOTAL
    rates = {p.step: p.value for p in client.get_metric_history(second["mlflow_run_id"], "train/learning_rate")}
    assert rates[min(rates)] == pytest.approx(1e-3) and rates[max(rates)] < 1e-3


def test_a_fit_counts_what_a_branch_has_seen_in_full(trained):
    folder, *_ = trained
    runs = {run.name: run for run in read_experiment(f"sqlite:///{folder}/mlflow/mlflow.db", "tests", "classes.top1")}
    assert runs["branch"].point.samples == TOTAL
    assert runs["trunk"].point is None and runs["trunk"].reason == "it has not measured classes.top1"


def test_a_branch_is_the_same_run_when_it_starts_again(trained, folders, make_config, monkeypatch, capsys):
    folder, _, second = trained
    monkeypatch.chdir(folder)
    recorded = json.loads((folder / "runs/branch/run.json").read_text())["config"]
    assert train_job.main(TrainConfig.model_validate(recorded)) == json.loads(json.dumps(second))
    captured = capsys.readouterr()
    assert "run 'branch' is complete already" in captured.err
    assert "100 before the branch, 160 in" in captured.out
    with pytest.raises(UserError, match=r"holds a run with branch_from = .*@95, not .*@150"):
        train_job.main(TrainConfig.model_validate(recorded | {"branch_from": f"{folder}/runs/trunk@150"}))


def test_a_checkpoint_is_found_by_its_samples(trained):
    folder, *_ = trained
    run = folder / "runs/trunk"
    for samples, name in [(0, 100), (100, 100), (101, 160), (200, 200)]:
        assert find_checkpoint(f"{run}@{samples}").name == f"samples-{name:012}"
    assert find_checkpoint("a/checkpoint").name == "checkpoint"
    with pytest.raises(UserError, match=r"trunk' has no checkpoint at or after 201 samples; its last is at 200$"):
        find_checkpoint(f"{run}@201")
    with pytest.raises(UserError, match="nowhere' holds no run with a checkpoint"):
        find_checkpoint(f"{folder}/nowhere@10")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 4}, "is of a run with seed = 3, not 4: a branch goes on with what its trunk would have seen"),
        ({"data": {"fraction": 1.0}}, "is of a run with data.fraction = 0.5, not 1.0"),
        ({"data": {"crop_scale": (0.5, 1.0)}}, r"is of a run with data.crop_scale = \[0.9, 1.0\], not \[0.5, 1.0\]"),
        ({"data": {"shuffle_window": 4}}, "is of a run with data.shuffle_window = 8, not 4"),
        ({"batch_size": 10}, "is of a run with batch_size = 20, not 10"),
        ({"model": {"embed_dim": 8}}, "is of a run with model.embed_dim = 16, not 8"),
        ({"loss": {"kind": "sigmoid"}}, "is of a run with (loss.kind = info_nce, not sigmoid|model.init_logit_)"),
        ({"samples": 100}, "the branch is over before it begins: .* has 100 samples behind it, the run is of 100"),
        ({"branch_from": "other"}, "'.*other' is not a checkpoint: no readable state.json in it"),
        ({"data": {"path": "pictures"}, "samples": 200}, "was trained on another data set than the one in"),
    ],
)
def test_what_cannot_branch_off_is_refused_in_one_line(trained, folders, make_config, monkeypatch, changes, told):
    folder, *_ = trained
    monkeypatch.chdir(folder)
    config = branch_config(make_config, folders, "refused", samples=TOTAL, branch_from="runs/trunk@95")
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    if config["data"]["path"] == "pictures":
        config["data"] |= {"path": str(folders / "pictures"), "fraction": 0.5}
        config["batch_size"] = BATCH
    with pytest.raises(UserError, match=told) as caught:
        train_job.main(TrainConfig.model_validate(config))
    assert "\n" not in str(caught.value)
    assert not (folder / "runs/refused/run.json").exists()


def test_a_branch_brings_its_weights(make_config):
    with pytest.raises(ValueError, match="branch_from brings its weights: leave weights out"):
        TrainConfig.model_validate(make_config("both", "data", samples=9, branch_from="a", weights="b"))
