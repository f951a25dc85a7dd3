"""What the fields of the settings say of themselves: what is a path, what decides a result, what had another name."""

import re
from typing import Annotated

import pytest
import yaml
from pydantic import Field

import benchmarks.config
import rayclip.config
import rayclip.serve.config
from rayclip.config import Config, IndexConfig, SweepConfig, TrainConfig
from rayclip.config.base import (
    AnyOrInputPath,
    Effect,
    InputModel,
    InputPath,
    NotPath,
    OutputPath,
    PathMark,
    RenamedFrom,
    TrackingMark,
    TrackingUri,
)
from rayclip.config.fields import keys_with, map_paths, marked_values, marks_in, models_of, without
from rayclip.config.loader import load, read_record
from rayclip.errors import UserError
from rayclip.orchestration.train.plan import resolve
from rayclip.orchestration.train.run_folder import RunFolder

LOOKS_LIKE_A_PATH = re.compile(r"\b(folder|file|path|address|checkpoint|output|csvs?|summary)\b", re.IGNORECASE)
NAMED_LIKE_A_PATH = re.compile(r"(^|_)(path|folder|file|dir|root|output|uri)s?$")


def all_configs():
    modules = (rayclip.config, rayclip.serve.config, benchmarks.config)
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return sorted((c for c in found if issubclass(c, Config) and c is not Config), key=lambda c: c.__name__)


def test_a_text_that_may_be_a_path_says_whether_it_is_one():
    assert len(all_configs()) > 30
    looks = {
        f"{schema.__name__}.{name}": marks_in(field, PathMark) or marks_in(field, TrackingMark)
        for schema in all_configs()
        for name, field in schema.model_fields.items()
        if re.search(r"\b(str|Any)\b", str(field.annotation))
        and (LOOKS_LIKE_A_PATH.search(field.description or "") or NAMED_LIKE_A_PATH.search(name))
    }
    assert {"DataConfig.path", "ClassifyConfig.labels", "SuiteConfig.tracking_uri"} <= looks.keys() and len(looks) > 40
    unmarked = [name for name, marks in looks.items() if not marks]
    assert not unmarked, "mark the field: InputPath, OutputPath or their kin, or NotPath"


class Part(Config):
    path: InputPath
    kind: str = "a"


class Inner(Config):
    where: OutputPath | None = None
    free: Annotated[int, Effect.SAME_RESULT] = 0
    fixed: int = 0
    new: Annotated[int, RenamedFrom("old")] = 0


class Outer(Config):
    model: InputModel = "models:/a@b"
    labels: InputPath | tuple[str, ...] = "labels.txt"
    many: tuple[InputPath, ...] = ("a", "b")
    parts: tuple[Part, ...] = (Part(path="c"),)
    named: dict[str, Part] = Field({"x": Part(path="d")})
    anything: tuple[AnyOrInputPath, ...] = (1, "e")
    plain: str = "f"
    other: NotPath = "g"
    uri: TrackingUri | None = None
    inner: Inner = Inner()
    skip: Annotated[Inner | None, Effect.SAME_RESULT] = None


def test_paths_are_found_wherever_they_are():
    config = Outer(inner=Inner(where="h"))
    found = [(key, value, getattr(mark, "access", "uri")) for key, value, mark in marked_values(config)]
    assert found == [
        ("model", "models:/a@b", "read"),
        ("labels", "labels.txt", "read"),
        ("many", "a", "read"),
        ("many", "b", "read"),
        ("parts.path", "c", "read"),
        ("named.x.path", "d", "read"),
        ("anything", "e", "read"),
        ("other", "g", None),
        ("uri", "", "uri"),
        ("inner.where", "h", "write"),
    ]
    assert [v.key for v in marked_values(Outer(labels=("x", "y")))].count("labels") == 0  # labels, and no path


def test_paths_are_replaced_and_nothing_else_is():
    config = Outer(labels=("x", "y"))
    new = map_paths(config, lambda path, mark: path if mark.may_be_registered else f"/{path}")
    assert new.model_dump(exclude_defaults=True) == {
        "labels": ("x", "y"),
        "many": ("/a", "/b"),
        "parts": ({"path": "/c"},),
        "named": {"x": {"path": "/d"}},
        "anything": (1, "/e"),
    }
    assert map_paths(config, lambda path, mark: path) is config


def test_keys_are_found_by_what_they_have_to_do_with_the_result():
    assert keys_with(Outer, Effect.SAME_RESULT) == {"skip", "inner.free", "inner.where"}
    values = Outer(skip=Inner()).model_dump()
    left = without(values, keys_with(Outer, Effect.SAME_RESULT))
    assert left["inner"] == {"fixed": 0, "new": 0} and "skip" not in left
    assert left.keys() == values.keys() - {"skip"} and values["inner"].keys() == Inner.model_fields.keys()


def test_a_run_goes_on_with_what_leaves_its_weights_alone_and_with_nothing_else(tmp_path):
    begun = {"name": "r", "model": "ViT-Nano/8@32", "data": {"path": "d"}, "samples": 100, "batch_size": 8}
    config = TrainConfig.model_validate(begun)
    folder = RunFolder(tmp_path)

    def check(changes):
        changed = {**begun, **changes}
        changed["data"] = begun["data"] | changes.get("data", {})
        now = TrainConfig.model_validate(changed).model_dump(mode="json")
        folder.check_same({"config": config.model_dump(mode="json")}, now)

    for changes in (
        {"data": {"max_bad_fraction": 0.5}},
        {"loss": {"distribution": "ring", "tile_size": 64}},
        {"guard": {"max_interventions": 99}},
        {"evaluation": {"every_samples": 5, "asynchronous": True}},
        {"compile": True, "micro_batch_size": 4, "runs": "elsewhere"},
        {"cluster": {"num_workers": 2}, "tracking": {"alias": "x"}, "checkpoint": {"keep": 9}},
    ):
        check(changes)
    for changes, told in (
        ({"data": {"flip": 0.5}}, r"data.flip = 0.0, not 0.5"),
        ({"loss": {"kind": "sigmoid"}}, "loss.kind = info_nce, not sigmoid"),
        ({"guard": {"action": "skip"}}, "guard.action = stop, not skip"),
        ({"optimizer": {"lr": 1}}, "optimizer.lr = 0.0005, not 1.0"),
        ({"weights": "w"}, "weights = None, not w"),
    ):
        with pytest.raises(UserError, match=f"holds a run with {told}: give this one another name"):
            check(changes)


def test_a_run_s_paths_hold_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "name": "r",
        "model": "ViT-Nano/8@32",
        "weights": "models:/a@b",
        "data": {"mixture": [{"path": "x"}, {"path": "s3://bucket/y"}]},
        "evaluation": {"tasks": {"t": {"kind": "retrieval", "path": "z"}}},
        "tracking": {"artifacts": "kept"},
        "samples": 100,
        "batch_size": 8,
    }
    resolved = resolve(TrainConfig.model_validate(values))
    assert [part.path for part in resolved.data.mixture] == [f"{tmp_path}/x", "s3://bucket/y"]
    assert resolved.evaluation.tasks["t"].path == f"{tmp_path}/z"
    assert (resolved.weights, resolved.runs, resolved.tracking.artifacts) == (
        "models:/a@b",
        f"{tmp_path}/runs",
        f"{tmp_path}/kept",
    )
    branch = TrainConfig.model_validate({**values, "weights": None, "branch_from": "runs/trunk@400"})
    assert resolve(branch).branch_from == f"{tmp_path}/runs/trunk@400"


# Keys that had other names


@pytest.fixture
def old_config(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "old",
                "model": "ViT-Nano/8@32",
                "data": {"path": "d"},
                "samples": 100,
                "batch_size": 8,
                "evaluation": {"beside": True, "beside_cpus": 2},
            }
        )
    )
    return path


def test_a_key_of_the_last_release_is_taken_with_a_line(old_config, capsys):
    config = load(TrainConfig, old_config, ["evaluation.beside_gpus=0.5"])
    evaluation = config.evaluation
    assert (evaluation.asynchronous, evaluation.validation_cpus, evaluation.validation_gpus) == (True, 2, 0.5)
    assert capsys.readouterr().err.splitlines() == [
        f"note: 'evaluation.{old}' is called 'evaluation.{new}' now; the old name is taken in this release only"
        for old, new in (
            ("beside", "asynchronous"),
            ("beside_cpus", "validation_cpus"),
            ("beside_gpus", "validation_gpus"),
        )
    ]
    # Whichever names are used, an override wins over the file.
    assert not load(TrainConfig, old_config, ["evaluation.asynchronous=false"]).evaluation.asynchronous
    assert not load(TrainConfig, old_config, ["evaluation={beside: false}"]).evaluation.asynchronous
    capsys.readouterr()
    assert load(IndexConfig, None, ["path=p", "broken=salvage"]).damaged_shards == "salvage"
    assert "'broken' is called 'damaged_shards' now" in capsys.readouterr().err
    load(IndexConfig, None, ["path=p", "damaged_shards=salvage"])
    assert capsys.readouterr().err == ""


def test_a_key_is_given_once(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text("path: p\nbroken: stop\ndamaged_shards: salvage\n")
    with pytest.raises(UserError, match="'broken' is called 'damaged_shards' now: give it once"):
        load(IndexConfig, path, [])


def test_keys_of_the_last_release_are_taken_in_sections_lists_and_names():
    class Whole(Config):
        inner: Inner = Inner()
        listed: tuple[Inner, ...] = ()
        named: dict[str, Inner] = Field({})

    old = {"inner": {"old": 1}, "listed": [{"old": 2}, {"new": 3}], "named": {"old": {"old": 4}}}
    config = read_record(Whole, old, "a record")
    assert (config.inner.new, [i.new for i in config.listed], config.named["old"].new) == (1, [2, 3], 4)
    assert old["inner"] == {"old": 1}  # a record is left as it is


def test_a_record_of_the_last_release_is_read_without_a_word(old_config, capsys):
    values = yaml.safe_load(old_config.read_text())
    assert read_record(TrainConfig, values, "run.json").evaluation.asynchronous
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match=r"run.json: unknown key 'evaluation.besides'"):
        read_record(TrainConfig, {**values, "evaluation": {"besides": True}}, "run.json")


def test_no_old_name_is_a_key_today_and_none_stands_for_two():
    for schema in all_configs():
        old = [mark.key for field in schema.model_fields.values() for mark in marks_in(field, RenamedFrom)]
        assert len(set(old)) == len(old) and not set(old) & schema.model_fields.keys()


def test_the_plan_of_a_sweep_is_found_in_either_kind():
    kinds = models_of(SweepConfig.model_fields["plan"].annotation)
    assert [kind.__name__ for kind in kinds] == ["LadderPlan", "SearchPlan"]
    assert {"plan.num_trials", "plan.form", "plan.frontier"} <= keys_with(SweepConfig, Effect.SAME_RESULT)
