"""The jobs of the public API in the tests' own process: typed results of what the commands do, without a word."""

import json

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import rayclip
from rayclip.config import TrainConfig
from rayclip.config.loader import load_from_python
from rayclip.io.paths import storage_path
from rayclip.orchestration.train.run_folder import RunFolder

NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_samples, write_dataset, make_config):
    """A folder with a data set for training, one for evaluation, and a config as YAML."""
    place = tmp_path_factory.mktemp("api")
    write_dataset(place / "data", make_samples(NUM_SAMPLES))
    write_dataset(place / "suite" / "classes" / "test", make_samples(30, seed=1))
    (place / "suite" / "classes" / "classnames.txt").write_text("one\ntwo\nthree\n")
    config = make_config(
        "from-file",
        place / "data",
        epochs=1,
        evaluation={
            "tasks": {"classes": {"kind": "zero_shot", "path": str(place / "suite" / "classes" / "test")}},
            "best": "classes.top1",
        },
        tracking={"uri": f"sqlite:///{place}/mlflow.db", "register_as": "tiny"},
    )
    (place / "suite" / "classes" / "test" / "classnames.txt").write_text("one\ntwo\nthree\n")
    (place / "train.yaml").write_text(yaml.safe_dump({**config, "runs": str(place / "runs")}))
    return place


@pytest.fixture(scope="module")
def trained(place):
    return rayclip.train(place / "train.yaml", name="mine", checkpoint={"keep": 2}, **{"optimizer.lr": 2e-3})


def test_train_does_what_the_command_does(place, trained):
    folder = RunFolder(storage_path(str(place / "runs" / "mine")))
    assert trained.summary == json.loads(folder.summary.read_text())
    assert trained.folder == str(folder.path)
    config = folder.read_record()["config"]
    assert (config["name"], config["optimizer"]["lr"], config["optimizer"]["warmup_samples"]) == ("mine", 2e-3, 200)
    assert config["checkpoint"]["keep"] == 2
    assert trained.samples_seen == NUM_SAMPLES
    assert trained.model == "models:/tiny/1"
    assert trained.metrics["classes.top1"] == trained.summary["zero_shot"]["classes"]["top1"]
    model = rayclip.load(trained.model, "cpu", tracking_uri=f"sqlite:///{place}/mlflow.db")
    texts = ["one", "two"]
    np.testing.assert_array_equal(
        model.encode_texts(texts), rayclip.load(trained.checkpoint, "cpu").encode_texts(texts)
    )


def test_a_second_call_finds_the_run_complete_and_says_nothing(place, trained, capfd):
    values = yaml.safe_load((place / "train.yaml").read_text())
    again = rayclip.train(values, name="mine", checkpoint={"keep": 2}, **{"optimizer.lr": 2e-3})
    assert again == trained
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_progress_is_shown_where_it_is_wanted(place, trained, capfd):
    rayclip.train(place / "train.yaml", progress=True, name="mine", checkpoint={"keep": 2}, **{"optimizer.lr": 2e-3})
    out, err = capfd.readouterr()
    assert out == ""
    assert "run 'mine' is complete already" in err


def test_evaluate_measures_what_the_training_did(place, trained, capfd):
    model = rayclip.load(trained.model, "cpu", tracking_uri=f"sqlite:///{place}/mlflow.db")
    suite = {"name": "tiny", "datasets": {"classes": {"templates": "plain"}}, "root": str(place / "suite")}
    result = rayclip.evaluate(model, suite, output=place / "report", cache=place / "cache")
    assert capfd.readouterr() == ("", "")
    assert result.scores["classes"] == pytest.approx(trained.metrics["classes.top1"])
    assert (result.suite, result.model_version, result.not_there) == ("tiny", "tiny/1", {})
    assert result.folder == str(place / "report")
    assert "classes" in storage_path(result.report).read_text()
    assert result.summary["datasets"]["classes"]["num_samples"] == 30


def test_embed_writes_the_features_that_the_model_gives(place, trained, capfd):
    result = rayclip.embed(trained.checkpoint, place / "data", place / "features", part_samples=20)
    assert capfd.readouterr() == ("", "")
    assert (result.samples, result.images, result.texts, result.errors) == (NUM_SAMPLES, NUM_SAMPLES, NUM_SAMPLES, {})
    table = pq.read_table(result.parts, columns=["caption", "text_embedding"])
    features = rayclip.load(trained.checkpoint, "cpu").encode_texts(table["caption"].to_pylist())
    np.testing.assert_allclose(np.stack(table["text_embedding"].to_numpy()), features, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda place: rayclip.train(place / "none.yaml"), "no config at"),
        (lambda place: rayclip.train(place / "train.yaml", nmae="x"), "unknown key 'nmae'.*'name'"),
        (lambda place: rayclip.train(place / "train.yaml", **{"optimizer.lr": "fast"}), "'optimizer.lr' is 'fast'"),
        (lambda place: rayclip.train(place / "train.yaml", name="x", data={"path": "gone"}), "gone"),
        (lambda place: rayclip.train(7), "a config is a YAML file"),
        (lambda place: rayclip.evaluate("no/model", {"name": "x", "datasets": {"a": {}}}), "data set 'a'"),
        (lambda place: rayclip.embed("no/model", place / "data", place / "out"), "no model at 'no/model'"),
    ],
)
def test_mistakes_are_user_errors(place, call, message):
    with pytest.raises(rayclip.UserError, match=message):
        call(place)


def test_settings_from_python_are_merged_as_the_command_s_are(place):
    values = yaml.safe_load((place / "train.yaml").read_text())
    base = load_from_python(TrainConfig, values, {})
    merged = load_from_python(TrainConfig, base, {"data": {"flip": True}, "model": "ViT-B/32", "runs": place})
    assert (merged.data.path, merged.data.flip) == (str(place / "data"), True)
    assert (merged.model, merged.runs) == ("ViT-B/32", str(place))
    # A dotted key replaces what it names, as on the command line.
    assert load_from_python(TrainConfig, base, {"evaluation.tasks": {}, "evaluation.best": None}).evaluation.tasks == {}


def test_the_mlflow_run_is_the_one_that_is_named(place, trained):
    client = mlflow.MlflowClient(f"sqlite:///{place}/mlflow.db")
    assert client.get_run(trained.mlflow_run_id).info.run_name == "mine"
