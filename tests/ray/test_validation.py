"""Evaluation beside training: held, killed, given up; the run is the one that it is with evaluation on the workers."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from rayclip.config import TrainConfig
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.evaluation.tasks import Evaluator
from rayclip.inference.encoder import Encoder
from rayclip.orchestration.train.driver import run_training
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.training.checkpoint import load_model, read_metrics

NUM_SAMPLES, BATCH = 200, 20
CHECKPOINT_EVERY, EVALUATE_EVERY = 40, 80
EVALUATED = [80, 160, 200]
WAIT_S = 180
TITLE = "ray::run_validation_fn"


class Gate:
    """A shard that whoever opens it waits for, in the place of what it holds, until it is opened."""

    def __init__(self, shard: Path) -> None:
        self._shard, self._content = shard, shard.with_name("content")

    def close(self):
        """Shut it; who has read it has read it."""
        self._shard.rename(self._content)
        os.mkfifo(self._shard)

    def open(self):
        """Those that come now find the content."""
        self._content.replace(self._shard)

    def catch(self, before_kill=lambda: None):
        """Kill the process that measures, with SIGKILL, while it waits here: it has begun, and is not done."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                if self._has_stopped(process):
                    before_kill()
                    process.kill()
                    psutil.wait_procs([process], timeout=10)
                    return
            time.sleep(0.05)
        raise AssertionError("nothing came to be measured")

    def _has_stopped(self, process):
        try:
            if not process.cmdline() or not process.cmdline()[0].startswith(TITLE):
                return False
            process.suspend()
            try:
                os.close(os.open(self._shard, os.O_WRONLY | os.O_NONBLOCK))  # works where somebody waits to read
                return True
            except OSError as error:
                assert error.errno == errno.ENXIO
                process.resume()
        except psutil.Error:
            pass
        return False


class Notes:
    """A run's line, of which only the notes count; `hear` gets each."""

    def __init__(self, hear=lambda text: None):
        self.heard, self._hear = [], hear

    def __call__(self, total, start=0):
        return self

    def update(self, done, rate=None, **shown):
        pass

    def note(self, text):
        self.heard.append(text)
        self._hear(text)

    def close(self):
        pass


@pytest.fixture
def in_background():
    """Runs a function beside the test; what it raises, the test raises."""
    threads, errors = [], []

    def start(function, *arguments):
        def run():
            try:
                function(*arguments)
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(WAIT_S)
    assert not errors, errors


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_samples, write_dataset):
    """Data to train on."""
    folder = tmp_path_factory.mktemp("beside")
    write_dataset(folder, make_samples(NUM_SAMPLES), shard_samples=100, chunk_samples=10)
    return folder


@pytest.fixture
def pictures(tmp_path, make_samples, write_dataset):
    """Data to measure on, in one shard."""
    folder = tmp_path / "measured"
    write_dataset(folder, make_samples(40, seed=1), shard_samples=40)
    (folder / "classnames.txt").write_text("one\ntwo\nthree\n")
    return folder


@pytest.fixture
def gate(pictures):
    return Gate(next(pictures.glob("*.tar")))


@pytest.fixture
def make_run(make_config, data, pictures, tmp_path, monkeypatch):
    """A run's settings as plain values: one worker, and one process beside it."""
    monkeypatch.chdir(tmp_path)

    def make(name, asynchronous=True):
        return make_config(
            name,
            data,
            epochs=1,
            batch_size=BATCH,
            ema={"half_life_samples": 50},
            evaluation={
                "every_samples": EVALUATE_EVERY,
                "best": "pairs.text_to_image.recall_at_5",
                "asynchronous": asynchronous,
                "tasks": {
                    "classes": {"kind": "zero_shot", "path": str(pictures)},
                    "pairs": {"kind": "retrieval", "path": str(pictures)},
                },
            },
            checkpoint={"every_samples": CHECKPOINT_EVERY, "keep": 1, "at_samples": [EVALUATED[0]]},
            tracking={"register_as": name},
        )

    return make


def run(config, notes=None):
    return run_training(TrainConfig.model_validate(config), notes or Notes())


def checkpoint_at(name, samples):
    return RunFolder(Path("runs").absolute() / name).checkpoints / f"samples-{samples:012}"


def close_when_begun(gate, name):
    """The driver looks at the data before it writes what the run is."""
    deadline = time.monotonic() + WAIT_S
    while not Path(f"runs/{name}/run.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    gate.close()


def points_of(summary, prefixes=("evaluation/", "checkpoint/")):
    """MLflow's points of a run, as (step, value) in their order."""
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow/mlflow.db")
    run_id = summary["mlflow_run_id"]
    keys = [key for key in client.get_run(run_id).data.metrics if key.startswith(prefixes)]
    return {key: [(point.step, point.value) for point in client.get_metric_history(run_id, key)] for key in keys}


def models_of(summary):
    """Step, state and metrics of each logged model of a run."""
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow/mlflow.db")
    experiment = client.get_run(summary["mlflow_run_id"]).info.experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{summary['mlflow_run_id']}'")
    return {
        int(model.tags["samples_seen"]): (str(model.status), {m.key: m.value for m in model.metrics or ()})
        for model in models
    }


def pictures_of(summary):
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow/mlflow.db")
    return [file.path for file in client.list_artifacts(summary["mlflow_run_id"], "pictures")]


def weights_of(summary):
    folder = checkpoint_at(summary["name"], NUM_SAMPLES)
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "ema", "optimizer")]


def measured_again(config, folder, ema):
    """What the tasks give for a checkpoint, in this process."""
    settings = TrainConfig.model_validate(config)
    encoder = Encoder(load_model(folder, ema=ema), get_tokenizer(16), "cpu")
    return Evaluator(settings.evaluation.tasks, 16, settings.evaluation.batch_size).run(encoder)


def without_names(summary):
    """A summary without what two runs of the same settings differ in."""
    own = ("name", "checkpoint", "mlflow_run_id", "registered_model", "train_time_s", "samples_per_s")
    return {key: value for key, value in summary.items() if key not in (*own, "data_wait_share")}


def test_training_goes_on_while_an_evaluation_is_held_and_ends_as_it_does_without(make_run, gate, in_background):
    config = make_run("beside")
    seen_while_held = []

    def hear(text):
        if text.startswith("waiting for the evaluation at 80 samples"):
            assert not read_metrics(checkpoint_at("beside", 80))["measured"]
            seen_while_held.append((checkpoint_at("beside", 120) / "state.json").is_file())
            # It dies in the middle, and is made again.
            in_background(gate.catch, gate.open)

    notes = Notes(hear)
    in_background(close_when_begun, gate, "beside")
    beside = run(config, notes)
    inline = run(make_run("inline", asynchronous=False), inline_notes := Notes())

    assert seen_while_held == [True], "the workers came to the next evaluation, past a checkpoint"
    measured = [text for text in inline_notes.heard if text.startswith("at ")]
    assert [text for text in notes.heard if text.startswith("at ")] == measured
    assert [int(text.split()[1]) for text in measured] == EVALUATED
    assert weights_of(beside) == weights_of(inline)
    assert without_names(beside) == without_names(inline)
    assert points_of(beside) == points_of(inline)
    assert {step for points in points_of(beside).values() for step, _ in points} == set(EVALUATED)
    assert models_of(beside) == models_of(inline)
    assert pictures_of(beside) == pictures_of(inline) == ["pictures/classes.png", "pictures/training_samples.png"]
    kept = [
        sorted(path.name for path in checkpoint_at(name, 0).parent.glob("samples-*")) for name in ("beside", "inline")
    ]
    assert kept[0] == kept[1] and "samples-000000000080" in kept[0]
    for name in kept[0]:
        contents = [read_metrics(checkpoint_at(run, 0).with_name(name)) for run in ("beside", "inline")]
        assert contents[0] == contents[1] and contents[0]["measured"]
    measured = read_metrics(checkpoint_at("beside", 80))["tasks"]
    again = [measured_again(config, checkpoint_at("beside", 80), ema) for ema in (False, True)]
    assert measured == {name: again[0][name] | {"ema": again[1][name]} for name in again[0]}


@pytest.mark.chaos
def test_what_was_to_be_measured_when_the_driver_was_killed_is_measured_once(make_run, gate, tmp_path, start_training):
    config = make_run("killed")
    training = start_training(tmp_path, config)
    close_when_begun(gate, "killed")
    training.wait_until(lambda state: state["samples_seen"] >= 120)
    training.kill()
    gate.open()
    listed = json.loads((training.checkpoints / "checkpoint_manager_snapshot.json").read_text())
    waiting = [result["checkpoint_dir_name"] for result in listed["pending_training_results"]]
    assert waiting == ["samples-000000000080"] and RunFolder(training.checkpoints.parent).has_pending_validation()
    assert not read_metrics(checkpoint_at("killed", 80))["measured"]

    notes = Notes()
    summary = run(config, notes)
    assert [int(text.split()[1]) for text in notes.heard if text.startswith("at ")] == EVALUATED
    points = points_of(summary)
    assert points["evaluation/classes.top1"] == points["checkpoint/classes.top1"]
    assert all([step for step, _ in of_key] == EVALUATED for of_key in points.values()), points
    assert sorted(models_of(summary)) == list(range(CHECKPOINT_EVERY, NUM_SAMPLES + 1, CHECKPOINT_EVERY))
    measured = read_metrics(checkpoint_at("killed", 80))["tasks"]["classes"]
    assert {key: measured[key] for key in measured if key != "ema"} == measured_again(
        config, checkpoint_at("killed", 80), False
    )["classes"]


@pytest.mark.chaos
def test_an_evaluation_that_dies_each_time_is_given_up_in_one_line_and_training_is_not(make_run, gate, in_background):
    def kill_each_time():
        close_when_begun(gate, "poison")
        gate.catch()
        gate.catch()
        gate.catch(gate.open)

    in_background(kill_each_time)
    summary = run(make_run("poison"), notes := Notes())
    (line,) = [text for text in notes.heard if "could not be measured" in text]
    assert line == "the checkpoint at 80 samples could not be measured: its process died 3 times; training goes on"
    assert [int(text.split()[1]) for text in notes.heard if text.startswith("at ")] == EVALUATED[1:]
    assert not read_metrics(checkpoint_at("poison", 80))["measured"]
    assert summary["samples_seen"] == NUM_SAMPLES and summary["model_version"] == 1
    assert models_of(summary)[80] == ("READY", {})


def test_a_cluster_without_room_beside_the_workers_is_said_before_anything_starts(make_run):
    config = make_run("crowded")
    config["evaluation"]["validation_cpus"] = 1000
    with pytest.raises(UserError, match=r"measures beside them \(evaluation.asynchronous\) needs 1002 CPU"):
        run(config)
    assert not Path("runs").exists()
