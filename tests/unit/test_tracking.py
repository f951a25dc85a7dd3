"""Runs, points and versions in a real embedded MLflow database."""

import json
import logging
import socket
import threading
import time

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from rayclip.errors import UserError
from rayclip.tracking import mlflow as tracking
from rayclip.tracking.mlflow import (
    DataSetInput,
    MlflowTracker,
    connect,
    fill_run,
    open_run,
    resolve_uri,
    run_address,
)
from rayclip.tracking.names import flatten
from rayclip.tracking.registry import MODEL_FILES, link_checkpoint, move_alias, register, roll_back

CONFIG = {"name": "small", "optimizer": {"lr": 0.1, "betas": [0.9, 0.98]}, "samples": None}


class NoMonitor:
    """In place of MLflow's watch over the machine, which is a thread."""

    def __init__(self, *args, **kwargs):
        pass

    def start(self):
        pass

    def finish(self):
        pass


@pytest.fixture(autouse=True)
def no_monitor(monkeypatch):
    monkeypatch.setattr(tracking, "SystemMetricsMonitor", NoMonitor)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One database for all tests here: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/deep/mlflow.db"


@pytest.fixture(scope="module")
def client(uri):
    return connect(uri)


@pytest.fixture
def run_id(uri, request):
    return open_run(uri, "tests", request.node.name, CONFIG, {"code_version": "abc"}, None)


def points(client, run_id, key):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


# Runs


def test_a_run_is_opened_once_with_its_settings(uri, client):
    first = open_run(uri, "opened once", "small", CONFIG, {"code_version": "abc"}, None)
    tracking.close_run(uri, first, succeeded=False)
    assert client.get_run(first).info.status == "FAILED"
    assert open_run(uri, "opened once", "small", CONFIG, {}, first) == first
    experiment = client.get_experiment_by_name("opened once")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_id for run in runs] == [first]
    assert runs[0].info.status == "RUNNING"
    assert runs[0].info.run_name == "small"
    expected = {"name": '"small"', "optimizer.lr": "0.1", "optimizer.betas": "[0.9, 0.98]", "samples": "null"}
    assert runs[0].data.params == expected
    assert runs[0].data.tags["code_version"] == "abc"
    assert [file.path for file in client.list_artifacts(first)] == ["config.json"]
    tracking.close_run(uri, first, succeeded=True)
    assert client.get_run(first).info.status == "FINISHED"


def test_more_settings_than_a_request_takes(uri, client):
    many = {f"key{i:03}": i for i in range(230)}
    run = client.get_run(open_run(uri, "tests", "many", many, {}, None))
    assert len(run.data.params) == 230
    assert run.data.params["key229"] == "229"


def test_artifacts_lie_beside_the_database(uri, client, run_id):
    folder = uri.removeprefix("sqlite:///").removesuffix("/mlflow.db")
    assert client.get_run(run_id).info.artifact_uri.startswith(f"file://{folder}/artifacts/")


def test_a_run_that_is_not_there_is_said(uri):
    with pytest.raises(UserError, match="the run's MLflow run 0123 is not in"):
        open_run(uri, "tests", "small", CONFIG, {}, "0123")


# Points


def test_a_step_is_not_logged_twice_and_none_is_left_out(uri, client, run_id):
    tracker = MlflowTracker(uri, run_id)
    for step in (10, 20, 30, 40):
        tracker.log({"train/loss": step / 10, "train/learning_rate": 1.0}, step)
    tracker.log({"evaluation/letters.top1": 0.25}, 20)
    tracker.close()
    # A crash rolled back to 20: the steps after it are taken again, a little otherwise.
    tracker = MlflowTracker(uri, run_id)
    for step in (30, 40, 50, 60):
        tracker.log({"train/loss": -1.0, "train/learning_rate": 2.0}, step)
    tracker.log({"evaluation/letters.top1": 0.5}, 40)
    tracker.log({"evaluation/letters.top1": 0.7}, 40)
    tracker.close()
    loss = points(client, run_id, "train/loss")
    assert loss == [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0), (50, -1.0), (60, -1.0)]
    assert points(client, run_id, "train/learning_rate") == [(s, 1.0 if s <= 40 else 2.0) for s, _ in loss]
    assert points(client, run_id, "evaluation/letters.top1") == [(20, 0.25), (40, 0.5)]


def test_what_is_no_number_is_left_out(uri, client, run_id):
    tracker = MlflowTracker(uri, run_id)
    tracker.log({"train/loss": float("nan"), "train/rate": float("inf"), "train/fine": 1.0}, 5)
    tracker.log({"train/loss": 2.0}, 5)
    tracker.close()
    assert points(client, run_id, "train/loss") == [(5, 2.0)]
    assert points(client, run_id, "train/rate") == []
    assert points(client, run_id, "train/fine") == [(5, 1.0)]


def test_constants_are_params_that_are_set_once(uri, client, run_id):
    tracker = MlflowTracker(uri, run_id)
    tracker.log_constants({"evaluation/letters.num_samples": 10})
    tracker.log_constants({"evaluation/letters.num_samples": 12, "evaluation/letters.chance_top1": 0.1})
    tracker.close()
    data = client.get_run(run_id).data
    assert data.params["evaluation/letters.num_samples"] == "10"
    assert data.params["evaluation/letters.chance_top1"] == "0.1"
    assert data.metrics == {}


def test_the_page_of_a_run_is_filled_in(uri, client, run_id):
    found = [
        DataSetInput("/data/letters/train", "a" * 64, "training", 100),
        DataSetInput("s3://bucket/letters/test", "b" * 64, "evaluation", 10),
    ]
    fill_run(uri, run_id, "- a CLIP", found)
    fill_run(uri, run_id, "- a CLIP", found)  # again, where a run goes on
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "- a CLIP"
    inputs = {
        (
            one.dataset.name,
            one.dataset.digest,
            one.dataset.source_type,
            json.loads(one.dataset.source)["uri"],
            tag.value,
        )
        for one in client.get_run(run_id).inputs.dataset_inputs
        for tag in one.tags
        if tag.key == "mlflow.data.context"
    }
    assert inputs == {
        ("train", "a" * 36, "local", "/data/letters/train", "training"),
        ("test", "b" * 36, "s3", "s3://bucket/letters/test", "evaluation"),
    }


def test_the_address_of_a_run(uri, run_id):
    assert run_address(uri, run_id) == f"{run_id} in {uri.removeprefix('sqlite:///')}, which `rayclip ui` opens"


class Flaky:
    """A client whose server is away, until it is back."""

    def __init__(self, client):
        self.client, self.away, self.largest = client, True, 0

    def __getattr__(self, name):
        return getattr(self.client, name)

    def log_batch(self, run_id, metrics):
        if self.away:
            raise MlflowException("the server is away")
        self.largest = max(self.largest, len(metrics))
        self.client.log_batch(run_id, metrics=metrics)


@pytest.fixture
def flaky(monkeypatch, client):
    flaky = Flaky(client)
    monkeypatch.setattr(tracking, "connect", lambda uri: flaky)
    return flaky


def test_a_server_that_is_away_delays_points(uri, client, run_id, flaky, caplog):
    tracker = MlflowTracker(uri, run_id)
    with caplog.at_level(logging.WARNING, logger=tracking.__name__):
        for step in range(3):
            tracker.log({"train/loss": float(step)}, step)
    assert len(caplog.records) == 3
    assert "the server is away" in caplog.text
    flaky.away = False
    tracker.log({"train/loss": 3.0}, 3)
    assert points(client, run_id, "train/loss") == [(step, float(step)) for step in range(4)]
    tracker.close()


def test_closing_sends_all_that_is_left(uri, client, run_id, flaky):
    tracker = MlflowTracker(uri, run_id)
    for step in range(1250):
        tracker._unsent += [tracking.Metric(f"train/{key}", 1.0, 0, step) for key in ("loss", "rate")]
    flaky.away = False
    tracker.close()
    assert flaky.largest == 1000
    assert len(points(client, run_id, "train/loss")) == len(points(client, run_id, "train/rate")) == 1250


def test_closing_gives_up_on_a_server_that_stays_away(uri, run_id, flaky):
    tracker = MlflowTracker(uri, run_id)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.close()


def test_nested_metrics_become_dotted_names():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


# Servers


def test_no_uri_is_the_embedded_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert resolve_uri("http://host:5000") == "http://host:5000"


def message_of(uri):
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        connect(uri)
    assert time.monotonic() - started < 8
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_server_that_is_not_there_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = message_of(f"http://127.0.0.1:{port}")
    assert message.startswith(f"no MLflow server answers at http://127.0.0.1:{port}: ")


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9\r\n", b"", b"HTTP/1.1 404 Not Found\r\n\r\n"])
def test_something_else_that_answers_is_no_server(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert "no MLflow server answers at" in message_of(f"http://127.0.0.1:{server.getsockname()[1]}/")
        finally:
            thread.join()


# Checkpoints and versions


@pytest.fixture
def checkpoint(tmp_path):
    """Files of a checkpoint, the ones that a version holds and others."""
    folder = tmp_path / "samples-000000000500"
    folder.mkdir()
    for name in (*MODEL_FILES, "optimizer.safetensors", "state.json"):
        (folder / name).write_text(f"content of {name}")
    return folder


METRICS = {"letters": {"top1": 0.5, "num_samples": 10}}


def test_a_checkpoint_is_linked_once(client, run_id, checkpoint):
    model = link_checkpoint(client, run_id, checkpoint, 500, METRICS)
    again = link_checkpoint(client, run_id, checkpoint, 500, METRICS)
    other = link_checkpoint(client, run_id, checkpoint, 1000, {})
    assert again.model_id == model.model_id != other.model_id
    experiment = client.get_run(run_id).info.experiment_id
    linked = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    assert {model.model_id for model in linked} == {model.model_id, other.model_id}
    assert all(model.status == "READY" for model in linked)
    assert model.tags["checkpoint"] == str(checkpoint)
    assert points(client, run_id, "checkpoint/letters.top1") == [(500, 0.5)]


def test_what_is_measured_after_a_checkpoint_was_linked_is_added_once(client, run_id, checkpoint):
    model = link_checkpoint(client, run_id, checkpoint, 500, {})
    client.log_metric(run_id, "checkpoint/letters.num_samples", 10, step=500, model_id=model.model_id)  # and it died
    link_checkpoint(client, run_id, checkpoint, 1000, METRICS)
    for _ in range(2):
        assert link_checkpoint(client, run_id, checkpoint, 500, METRICS).model_id == model.model_id
    expected = {"checkpoint/letters.top1": 0.5, "checkpoint/letters.num_samples": 10}
    for key, value in expected.items():
        assert sorted(points(client, run_id, key)) == [(500, value), (1000, value)]
    linked = client.get_logged_model(model.model_id)
    assert {metric.key: metric.value for metric in linked.metrics} == expected


def test_a_checkpoint_that_was_being_linked_when_a_crash_came_is_linked_once(client, run_id, checkpoint, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(client, "finalize_logged_model", crash)
        with pytest.raises(KeyboardInterrupt):
            link_checkpoint(client, run_id, checkpoint, 500, METRICS)
    model = link_checkpoint(client, run_id, checkpoint, 500, METRICS)
    assert model.status == "READY"
    assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [model.model_id]
    assert points(client, run_id, "checkpoint/letters.top1") == [(500, 0.5)]


def test_checkpoints_of_runs_that_share_a_name_are_kept_apart(uri, client, checkpoint):
    runs = [open_run(uri, "tests", "same name", {}, {}, None) for _ in range(2)]
    models = {link_checkpoint(client, run_id, checkpoint, 500, {}).model_id for run_id in runs}
    assert len(models) == 2


def test_a_version_holds_copies_of_the_models_files(uri, client, run_id, checkpoint, tmp_path):
    model = link_checkpoint(client, run_id, checkpoint, 500, METRICS)
    number = register(client, model, checkpoint, "letters")
    move_alias(client, "letters", "champion", number)
    for path in checkpoint.iterdir():
        path.unlink()
    version = client.get_model_version_by_alias("letters", "champion")
    assert int(version.version) == number
    assert version.run_id == run_id
    # As another process would find it, by name and alias alone.
    got = mlflow.artifacts.download_artifacts("models:/letters@champion", dst_path=tmp_path / "got", tracking_uri=uri)
    files = {path.name: path.read_text() for path in (tmp_path / "got").rglob("*") if path.is_file()}
    assert got
    assert {name: files.get(name) for name in MODEL_FILES} == {name: f"content of {name}" for name in MODEL_FILES}
    assert "optimizer.safetensors" not in files


def test_a_version_is_not_made_twice(client, run_id, checkpoint):
    models = [link_checkpoint(client, run_id, checkpoint, step, {}) for step in (500, 1000)]
    assert register(client, models[0], checkpoint, "moving") == 1
    assert register(client, models[1], checkpoint, "moving") == 2
    assert register(client, models[0], checkpoint, "moving") == 1
    assert len(client.search_model_versions("name = 'moving'")) == 2
    assert register(client, models[0], checkpoint, "another") == 1


def test_an_alias_goes_back_to_where_it_was(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    client.create_registered_model("letters")
    for _ in range(4):
        client.create_model_version("letters", tmp_path.as_uri())
    for number in (1, 2, 4):
        move_alias(client, "letters", "champion", number)
    assert roll_back("models:/letters@champion", None, uri) == (4, 2)
    assert roll_back("models:/letters@champion", None, uri) == (2, 1)  # further back, not to what was left
    assert roll_back("models:/letters@champion", 3, uri) == (1, 3)
    client.set_registered_model_alias("letters", "other", "3")  # by hand, in MLflow's own page
    assert roll_back("models:/letters@other", None, uri) == (3, 2)
    client.set_registered_model_alias("letters", "first", "1")
    with pytest.raises(UserError, match="is at version 1 and there is none before it"):
        roll_back("models:/letters@first", None, uri)
    with pytest.raises(UserError, match="has no version 9"):
        roll_back("models:/letters@champion", 9, uri)
    with pytest.raises(UserError, match="names no alias"):
        roll_back("models:/letters/3", None, uri)
    assert client.get_model_version_by_alias("letters", "champion").version == 3
