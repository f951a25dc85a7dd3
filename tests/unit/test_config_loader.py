"""Settings files: what wins over what, and one clear line for every mistake."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from rayclip.config import Config, IndexConfig, IngestConfig, TrainConfig
from rayclip.config.loader import describe, load, validate
from rayclip.config.recipes import list_recipes
from rayclip.errors import UserError
from rayclip.serve.config import ServeConfig

RECIPES = Path(__file__).parents[2] / "platform/rayclip/recipes"

MINIMAL = {"name": "small", "model": "ViT-Nano/8@32", "data": {"path": "somewhere"}, "epochs": 3, "batch_size": 64}
TASKS = {"a": {"kind": "retrieval", "path": "p"}}


@pytest.fixture
def settings(tmp_path):
    """Loads TrainConfig from MINIMAL with these changes, written as YAML, and overrides."""

    def load_with(changes=None, overrides=(), without=()):
        values = {key: value for key, value in (MINIMAL | (changes or {})).items() if key not in without}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return load(TrainConfig, path, list(overrides))

    return load_with


def message_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What wins


def test_defaults_then_yaml_then_overrides_in_order(settings):
    config = settings(
        {"optimizer": {"lr": 0.1, "weight_decay": 0.3}}, ["optimizer.lr=0.2", "data.path=x", "optimizer.lr=0.4"]
    )
    assert config.optimizer.lr == 0.4
    assert config.optimizer.weight_decay == 0.3
    assert config.optimizer.eps == 1e-6
    assert config.data.path == "x"
    assert config.data.shuffle_window == 8
    assert config.cluster.num_workers == 1


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.max_grad_norm=1.5", 1.5),
        ("optimizer.max_grad_norm=null", None),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("tracking.uri=http://host:5000/a=b", "http://host:5000/a=b"),
        ("cluster.use_gpu=true", True),
        ("evaluation.tasks.letters={kind: retrieval, path: p}", {"kind": "retrieval", "path": "p"}),
    ],
)
def test_an_override_is_a_yaml_value(settings, override, value):
    config = settings(overrides=[override])
    for part in override.partition("=")[0].split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    assert (config.model_dump() if isinstance(config, Config) else config) == value


def test_an_override_makes_the_mappings_on_its_way(settings):
    config = settings(overrides=["evaluation.tasks.letters.path=p", "evaluation.tasks.letters.kind=retrieval"])
    assert config.evaluation.tasks["letters"].path == "p"


def test_settings_without_a_file(tmp_path):
    assert load(IndexConfig, None, ["path=here"]).path == "here"
    assert message_of(load, IndexConfig, None, ["pth=here"]).startswith("command line: ")


def test_settings_are_frozen(settings):
    config = settings()
    with pytest.raises(ValidationError):
        config.seed = 5
    with pytest.raises(ValidationError):
        config.optimizer.lr = 5


def test_the_resolved_settings_are_settings_again(settings):
    config = settings({"evaluation": {"tasks": {"a": {"path": "p", "kind": "zero_shot", "templates": ["{}", "a {}"]}}}})
    assert validate(TrainConfig, config.model_dump(mode="json"), "again") == config


# Mistakes


def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = "no config at 'my/dmo.yaml': give a YAML file, or a recipe's name; did you mean 'demo'?"
    assert message_of(load, TrainConfig, "my/dmo.yaml", []) == expected
    assert message_of(load, TrainConfig, "dmo", []) == "no recipe 'dmo': did you mean 'demo'?"
    assert message_of(load, TrainConfig, "q.yaml", []) == "no config at 'q.yaml': give a YAML file, or a recipe's name"
    assert message_of(load, TrainConfig, tmp_path, []).startswith(f"no config at '{tmp_path}'")


def test_a_recipe_is_found_by_name_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo = load(TrainConfig, "demo", ["seed=5"])
    assert (demo.name, demo.seed) == ("demo", 5)
    (tmp_path / "demo").write_text("name: mine")
    assert load(TrainConfig, "demo", ["seed=5"]) == demo
    assert "demo" in list_recipes() and list_recipes() == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert capsys.readouterr().err == ""
    assert load(TrainConfig, "jobs/configs/demo.yaml", ["seed=5"]) == demo
    assert capsys.readouterr().err.startswith("note: 'jobs/configs/demo.yaml' is the recipe 'demo' now")
    served = load(ServeConfig, "serve/configs/demo.yaml", [])
    assert served == load(ServeConfig, "serve_demo", [])
    # A file that is still there is that file.
    (tmp_path / "jobs/configs").mkdir(parents=True)
    (tmp_path / "jobs/configs/demo.yaml").write_text(RECIPES.joinpath("demo.yaml").read_text())
    capsys.readouterr()
    assert load(TrainConfig, "jobs/configs/demo.yaml", ["seed=5"]) == demo
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a: [1, 2", "is not YAML: "),
        (b"a: b: c", "is not YAML: "),
        (b"\xff\xfe\xfa", "is not YAML: "),
        (b"- 1\n- 2", "must hold keys and values, not list"),
        (b"words", "must hold keys and values, not str"),
        (b"", "must hold keys and values, not NoneType"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content, line):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    message = message_of(load, TrainConfig, path, [])
    assert f"'{path}' {line}" in message


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr", "'optimizer.lr' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("optimizer.betas=[1, 2", "'optimizer.betas=[1, 2': the value is not YAML: "),
        ("name.first=x", "'name.first=x' reaches into 'name', which holds 'small' and no keys"),
        ("model.embed_dim=3", "reaches into 'model', which holds 'ViT-Nano/8@32' and no keys"),
        ("epochs.a.b=3", "reaches into 'epochs', which holds 3 and no keys"),
    ],
)
def test_a_malformed_override_is_refused(settings, override, line):
    assert line in message_of(settings, overrides=[override])


TASK = {"kind": "zero_shot", "path": "p"}
SOME_MODEL = {"embed_dim": 8, "vision": {"widht": 3}}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        # Unknown keys, with the nearest that exists where it stands.
        ({"optimiser": {}}, "unknown key 'optimiser': did you mean 'optimizer'?"),
        ({"optimizer": {"weight_decya": 1}}, "unknown key 'optimizer.weight_decya': did you mean 'weight_decay'?"),
        ({"model": SOME_MODEL}, "unknown key 'model.vision.widht': did you mean 'width'?"),
        (
            {"evaluation": {"tasks": {"letters": TASK | {"template": "x"}}}},
            "unknown key 'evaluation.tasks.letters.template': did you mean 'templates'?",
        ),
        (
            {"evaluation": {"tasks": {"a": TASK, "pairs": {"kind": "retrieval", "path": "p", "templates": "x"}}}},
            "unknown key 'evaluation.tasks.pairs.templates': allowed: kind, path",
        ),
        # Tasks whose names are spelled like kinds and keys.
        (
            {"evaluation": {"tasks": {"zero_shot": TASK | {"template": "x"}}}},
            "unknown key 'evaluation.tasks.zero_shot.template': did you mean 'templates'?",
        ),
        (
            {"evaluation": {"tasks": {"retrieval": TASK | {"template": "x"}}}},
            "unknown key 'evaluation.tasks.retrieval.template': did you mean 'templates'?",
        ),
        (
            {"evaluation": {"tasks": {"path": TASK | {"template": "x"}}}},
            "unknown key 'evaluation.tasks.path.template': did you mean 'templates'?",
        ),
        # Values of the wrong type or out of range.
        ({"epochs": "many"}, "'epochs' is 'many': input should be a valid integer"),
        ({"batch_size": 0}, "'batch_size' is 0: input should be greater than 0"),
        ({"data": {"path": 5}}, "'data.path' is 5: input should be a valid string"),
        ({"data": "folder"}, "'data' is 'folder': input should be a valid dictionary"),
        ({"name": "a/b"}, "'name' is 'a/b': string should match pattern"),
        ({"optimizer": {"betas": [0.9]}}, "'optimizer.betas.1' is"),
        ({"model": {"embed_dim": "big"}}, "'model.embed_dim' is 'big': input should be a valid integer"),
        ({"evaluation": {"tasks": {"a": {"kind": "zero_shot", "path": 3}}}}, "'evaluation.tasks.a.path' is 3"),
        ({"evaluation": {"tasks": {"a": {"kind": "zeroshot", "path": "p"}}}}, "'zeroshot'"),
        (
            {"evaluation": {"tasks": {"a": TASK | {"templates": 5}}}},
            "'evaluation.tasks.a.templates' is 5: input should be a valid tuple",
        ),
        # Missing keys.
        ({"data": {}}, "data: give exactly one of path, a data set, and mixture, a list of several"),
        ({"data": {"path": "x", "mixture": [{"path": "y"}]}}, "data: give exactly one of path"),
        ({"data": {"mixture": [{"weight": 2}]}}, "the key 'data.mixture.0.path' is missing"),
        ({"data": {"mixture": [{"path": "x", "weight": 0}]}}, "'data.mixture.0.weight' is 0: input should be greater"),
        (
            {"data": {"mixture": [{"path": "x", "weight": float("nan")}]}},
            "'data.mixture.0.weight' is nan: input should",
        ),
        ({"evaluation": {"tasks": {"a": {"path": "p"}}}}, "the key 'evaluation.tasks.a.kind' is missing"),
        ({"evaluation": {"tasks": {"a": {"kind": "retrieval"}}}}, "the key 'evaluation.tasks.a.path' is missing"),
        # What models check themselves.
        ({"samples": 5}, "give exactly one of epochs and samples"),
        ({"batch_size": 63, "cluster": {"num_workers": 2}}, "batch_size 63 is not a multiple of cluster.num_workers 2"),
        (
            {
                "cluster": {"num_workers": [1, 2]},
                "evaluation": {"asynchronous": True, "every_samples": 9, "tasks": TASKS},
            },
            "num_workers (1, 2) takes all room there is: evaluation.asynchronous needs one number",
        ),
        ({"evaluation": {"best": "letters.top1"}}, "evaluation.best 'letters.top1' is not measured; measured: -"),
        (
            {"evaluation": {"best": "a.top", "tasks": {"a": {"kind": "zero_shot", "path": "p"}}}},
            "evaluation.best 'a.top' is not measured; measured: a.top1, a.top5",
        ),
        ({"model": {"init_logit_bias": -10}}, "model.init_logit_bias is for loss.kind=sigmoid; leave it out"),
        ({"loss": {"kind": "softmax"}}, "loss.kind"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"model": {"vision": {"patch_size": 5}}}, "model.vision: patch_size 5 does not divide image_size 224"),
        ({"model": {"text": {"heads": 3}}}, "model.text: heads 3 does not divide width 512"),
    ],
)
def test_a_wrong_value_is_named(settings, changes, line):
    message = message_of(settings, changes)
    assert line in message
    assert message.partition(": ")[0].endswith("config.yaml")


@pytest.mark.parametrize("key", ["name", "model", "data", "batch_size"])
def test_a_missing_key_is_named(settings, key):
    assert message_of(settings, without=[key]).endswith(f"the key '{key}' is missing")


def test_no_duration_and_two_are_refused(settings):
    assert "exactly one of epochs and samples" in message_of(settings, without=["epochs"])
    assert settings({"samples": 10}, without=["epochs"]).samples == 10


# Help


def leaves(schema, prefix=""):
    """Every key that holds a value, walked by the schema's own JSON form."""
    whole = schema.model_json_schema()
    found = set()

    def walk(node, prefix):
        if "$ref" in node:
            walk(whole["$defs"][node["$ref"].rpartition("/")[2]], prefix)
        elif "properties" in node:
            for name, inner in node["properties"].items():
                walk(inner, [*prefix, name])
        elif isinstance(node.get("additionalProperties"), dict):
            inner = node["additionalProperties"]
            has_keys = {"$ref", "oneOf", "anyOf"} & inner.keys()  # a mapping to plain values is a value itself
            walk(inner, [*prefix, "NAME"] if has_keys else prefix)
        elif "$ref" in node.get("items", {}):
            walk(node["items"], prefix)
        elif "oneOf" in node or "anyOf" in node or "allOf" in node:
            options = [option for key in ("oneOf", "anyOf", "allOf") for option in node.get(key, [])]
            for option in options:
                walk(option, prefix)
        else:
            found.add(".".join(prefix))

    walk(whole, [])
    return found


@pytest.mark.parametrize("schema", [TrainConfig, IngestConfig, IndexConfig])
def test_help_lists_every_key(schema):
    described = {line.split()[0] for line in describe(schema).splitlines()}
    expected = leaves(schema)
    assert expected - described == set()
    for section in described - expected:
        assert any(leaf.startswith(f"{section}.") for leaf in expected), section


def test_help_says_default_and_meaning():
    lines = {line.split()[0]: line for line in describe(TrainConfig).splitlines()}
    assert lines["name"].split("  ", 2)[-1].split()[0] == "(required)"
    assert "0.0005" in lines["optimizer.lr"] and "peak learning rate" in lines["optimizer.lr"]
    assert "none" in lines["tracking.uri"]
    assert "evaluation.tasks.NAME.templates" in lines


def test_every_key_has_a_meaning():
    def fields(schema):
        for name, field in schema.model_fields.items():
            yield f"{schema.__name__}.{name}", field
            yield from (pair for inner in configs(field.annotation) for pair in fields(inner))

    def configs(annotation):
        if isinstance(annotation, type) and issubclass(annotation, Config):
            return [annotation]
        return [config for argument in get_args(annotation) for config in configs(argument)]

    unsaid = {
        name for schema in (TrainConfig, IngestConfig, IndexConfig) for name, f in fields(schema) if not f.description
    }
    assert not unsaid


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_that_comes_with_the_code_is_valid(path):
    schema = IngestConfig if path.name.startswith("ingest") else TrainConfig
    try:
        load(schema, path, [])
    except UserError as error:  # a recipe may leave keys to the command line
        assert "is missing" in str(error)
