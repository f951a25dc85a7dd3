"""From what people call a model to a folder with its weights, against a real embedded MLflow database."""

import hashlib
import shutil
import threading

import mlflow
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rayclip.errors import UserError
from rayclip.tracking import registry
from rayclip.tracking.mlflow import connect, open_run
from rayclip.tracking.model_uri import is_registered
from rayclip.tracking.registry import (
    MODEL_FILES,
    fetch,
    find_version,
    link_checkpoint,
    move_alias,
    register,
    resolve_model,
)


def write_model(folder, number):
    """Files that stand for a checkpoint; the weights tell which."""
    folder.mkdir(parents=True)
    save_file({"weight": np.full(1000, number, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"name": "letters-run"}')
    (folder / "metrics.json").write_text("{}")
    return folder


def publish(uri, checkpoint, step, name="letters"):
    """Register a checkpoint as the model's next version and champion; its number."""
    client = connect(uri)
    run_id = open_run(uri, "tests", "run", {}, {}, None)
    number = register(client, link_checkpoint(client, run_id, checkpoint, step, {}), checkpoint, name)
    move_alias(client, name, "champion", number)
    return number


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return [write_model(folder / "checkpoints" / f"samples-{n}", n) for n in (1, 2)]


@pytest.fixture(scope="module")
def uri(tmp_path_factory, checkpoints):
    """A database with two versions of one model. It is made once: its tables take seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    assert [publish(uri, checkpoint, n) for n, checkpoint in enumerate(checkpoints, 1)] == [1, 2]
    return uri


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def downloads(monkeypatch):
    """Counts how often artifacts are asked for."""
    asked = []
    download = mlflow.artifacts.download_artifacts

    def counted(*args, **kwargs):
        asked.append(args)
        return download(*args, **kwargs)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", counted)
    return asked


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def message_of(*args):
    with pytest.raises(UserError) as caught:
        resolve_model(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Registered versions


@pytest.mark.parametrize(("name", "number"), [("models:/letters@champion", 2), ("models:/letters/1", 1)])
def test_a_registered_model_is_a_local_folder_with_its_files(uri, checkpoints, name, number, cache, capfd):
    source = resolve_model(name, uri)
    assert (source.name, source.version) == ("letters", f"letters/{number}")
    assert source.folder.parent == cache
    assert {path.name for path in source.folder.iterdir()} == set(MODEL_FILES)
    assert weights(source.folder) == weights(checkpoints[number - 1])
    assert "Downloading" not in capfd.readouterr().err


def test_the_average_of_the_weights_can_be_the_version(uri, tmp_path):
    checkpoint = write_model(tmp_path / "averaged", 7)
    save_file({"weight": np.full(1000, 8, np.float32)}, checkpoint / "ema.safetensors")
    client = connect(uri)
    run_id = open_run(uri, "tests", "averaged", {}, {}, None)
    model = link_checkpoint(client, run_id, checkpoint, 3, {"letters": {"top1": 0.5, "ema": {"top1": 0.6}}})
    assert register(client, model, checkpoint, "averages", ema=True) == 1
    source = resolve_model("models:/averages/1", uri)
    assert {path.name for path in source.folder.iterdir()} >= set(MODEL_FILES)
    assert load_file(source.folder / "model.safetensors")["weight"][0] == 8
    metrics = client.get_run(run_id).data.metrics
    assert (metrics["checkpoint/letters.top1"], metrics["checkpoint/letters.ema.top1"]) == (0.5, 0.6)


def test_what_is_there_is_not_asked_for_again(uri, downloads, tmp_path, monkeypatch):
    version = find_version("models:/letters@champion", uri)
    assert not downloads, "looking an alias up downloads nothing"
    source = fetch(version, uri)
    assert len(downloads) == 1
    monkeypatch.setattr(registry, "connect_existing", lambda uri: pytest.fail("MLflow was asked"))
    assert fetch(version, uri) == source
    assert len(downloads) == 1


def test_the_alias_is_followed_when_it_moves(uri, checkpoints):
    assert str(find_version("models:/letters@champion", uri)) == "letters/2"
    client = connect(uri)
    client.set_registered_model_alias("letters", "moving", 1)
    assert find_version("models:/letters@moving", uri).number == 1
    client.set_registered_model_alias("letters", "moving", 2)
    assert find_version("models:/letters@moving", uri).number == 2
    client.delete_registered_model_alias("letters", "moving")


def test_a_model_made_anew_is_not_taken_for_the_one_before(uri, checkpoints):
    publish(uri, checkpoints[0], 1, name="fleeting")
    before = resolve_model("models:/fleeting/1", uri)
    connect(uri).delete_registered_model("fleeting")
    publish(uri, checkpoints[1], 1, name="fleeting")
    after = resolve_model("models:/fleeting/1", uri)
    assert after.version == before.version
    assert weights(before.folder) == weights(checkpoints[0])
    assert weights(after.folder) == weights(checkpoints[1])


def test_many_at_once_end_with_one_whole_folder(uri, checkpoints, cache):
    version = find_version("models:/letters/2", uri)
    sources, errors = [], []
    barrier = threading.Barrier(6)

    def get():
        barrier.wait()
        try:
            sources.append(fetch(version, uri))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=get) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(sources)) == 1
    assert weights(sources[0].folder) == weights(checkpoints[1])
    assert [path.name for path in cache.iterdir()] == [sources[0].folder.name], "nothing half done is left"


def test_a_folder_that_lost_a_file_is_fetched_again(uri, checkpoints):
    source = resolve_model("models:/letters/1", uri)
    (source.folder / "model.safetensors").unlink()
    assert resolve_model("models:/letters/1", uri) == source
    assert weights(source.folder) == weights(checkpoints[0])


def test_what_is_not_registered_is_said_with_what_is(uri):
    assert "no registered model 'leters'" in message_of("models:/leters@champion", uri)
    assert "did you mean 'letters'?" in message_of("models:/leters/1", uri)
    assert "has no alias 'best'" in message_of("models:/letters@best", uri)
    assert message_of("models:/letters@best", uri).endswith("it has: champion")
    assert "model 'letters' has no version 9" in message_of("models:/letters/9", uri)
    assert message_of("models:/letters/9", uri).endswith("the last is 2")


@pytest.mark.parametrize("name", ["models:/letters", "models:/letters@", "models:/a/b/c", "ftp://b/c", ""])
def test_what_is_no_name_is_said_with_what_would_be(name):
    assert "names no model: a model is models:/NAME@ALIAS" in message_of(name, None)


def test_mlflow_that_is_not_there(tmp_path):
    assert "no MLflow server answers at http://127.0.0.1:1" in message_of("models:/a@b", "http://127.0.0.1:1")
    assert "no MLflow database at" in message_of("models:/a@b", f"sqlite:///{tmp_path}/deep/mlflow.db")
    assert not (tmp_path / "deep").exists(), "looking does not make one"
    (tmp_path / "text").write_text("no database\n" * 100)
    assert "MLflow cannot be read at" in message_of("models:/a@b", f"sqlite:///{tmp_path}/text")
    assert "MLflow cannot be read at" in message_of("models:/a@b", "nonsense://x")


def test_a_version_whose_files_are_gone(checkpoints, tmp_path, cache):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    publish(uri, checkpoints[0], 1)
    shutil.rmtree(tmp_path / "artifacts")
    assert "version letters/1" in message_of("models:/letters/1", uri)
    assert not cache.exists() or not list(cache.iterdir())


# Folders


def test_a_checkpoint_is_named_by_its_folder_and_its_weights(checkpoints, monkeypatch):
    folder = checkpoints[0]
    digest = hashlib.sha256(weights(folder)).hexdigest()[:8]
    source = resolve_model(str(folder), None)
    assert source == registry.ModelSource("letters-run", f"samples-1@{digest}", folder)
    monkeypatch.chdir(folder.parent)
    assert resolve_model("samples-1", None) == source
    assert resolve_model("samples-1/", None) == source


def test_a_config_without_a_name(tmp_path):
    write_model(tmp_path / "weights", 1)
    (tmp_path / "weights/config.json").write_text('{"model": {}}')
    assert resolve_model(str(tmp_path / "weights"), None).name == "weights"


def test_what_is_no_checkpoint_is_said(checkpoints, tmp_path, monkeypatch):
    assert "the folder does not exist" in message_of(str(tmp_path / "nothing"), None)
    run = checkpoints[0].parent.parent
    monkeypatch.chdir(run.parent)
    message = message_of(run.name, None)
    assert message.startswith(f"'{run.name}' is no checkpoint: it has no model.safetensors and no config.json")
    assert message.endswith(f"did you mean '{run.name}/checkpoints/samples-2'?")
    folder = write_model(tmp_path / "broken", 1)
    (folder / "config.json").write_text("[]")
    assert "config.json cannot be read" in message_of(str(folder), None)


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: data[:5], lambda data: b"\xff" * 100])
def test_damaged_weights_are_said(tmp_path, damage):
    folder = write_model(tmp_path / "broken", 1)
    (folder / "model.safetensors").write_bytes(damage(weights(folder)))
    assert "is damaged: model.safetensors cannot be read" in message_of(str(folder), None)


def test_which_names_can_move(tmp_path):
    assert is_registered("models:/letters@champion") and is_registered("models:/letters/2")
    assert not is_registered(str(tmp_path))
    with pytest.raises(UserError, match="names no registered model"):
        find_version(str(tmp_path), None)


# Exported weights


def test_exported_weights_are_named_by_what_they_are_in_and_what_they_hold(tmp_path):
    folder = write_model(tmp_path / "exported", 3)
    digest = hashlib.sha256(weights(folder)).hexdigest()[:8]
    (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    (folder / "config.json").rename(folder / "open_clip_config.json")
    source = registry.ModelSource("letters-run", f"exported@{digest}", folder)
    assert resolve_model(str(folder), None) == source
    (folder / "open_clip_config.json").unlink()
    assert "it has no open_clip_config.json" in message_of(str(folder), None)

    file = folder / "open_clip_model.safetensors"
    assert resolve_model(str(file), None) == registry.ModelSource(file.name, f"{file.name}@{digest}", file)
    (folder / "open_clip_config.json").write_text("{}")
    file.write_bytes(file.read_bytes()[:100])
    assert "is damaged: open_clip_model.safetensors cannot be read" in message_of(str(folder), None)
