"""Search spaces, and the rows of a sweep."""

import csv
import io

import numpy as np
import pytest

from rayclip.config import Choices, Range, SearchPlan, SweepConfig, TrainConfig
from rayclip.config.loader import validate
from rayclip.errors import UserError
from rayclip.scaling.flops import forward_gmacs, num_parameters, training_flops
from rayclip.scaling.points import read_csv
from rayclip.scaling.rungs import count, make_row, write_rows
from rayclip.scaling.search import check_space, draw, trial_config

SPACE = {
    "optimizer.lr": Range(low=1e-4, high=1e-2, log=True),
    "optimizer.weight_decay": Range(low=0.0, high=0.5),
    "optimizer.warmup_samples": Range(low=1, high=4),
    "batch_size": Choices(choices=(32, 64)),
    "data.crop_scale": Choices(choices=([0.5, 1.0], [0.9, 1.0])),
}


@pytest.fixture
def base(tiny_config):
    return {
        "name": "base",
        "model": tiny_config.model_dump(mode="json"),
        "data": {"path": "data"},
        "samples": 1000,
        "batch_size": 32,
        "evaluation": {"every_samples": 100, "tasks": {"letters": {"kind": "zero_shot", "path": "pictures"}}},
    }


@pytest.fixture
def sweep(base):
    def make(**plan):
        values = {"name": "s", "metric": "letters.top1", "base": base}
        values["plan"] = {
            "kind": "search",
            "space": {k: v.model_dump() for k, v in SPACE.items()},
            "num_trials": 3,
            **plan,
        }
        return validate(SweepConfig, values, "test")

    return make


def test_draws_fill_their_spans_evenly_and_depend_on_seed_and_number_alone():
    drawn = [draw(SPACE, 0, i) for i in range(4000)]
    assert drawn[17] == draw(SPACE, 0, 17) != draw(SPACE, 1, 17)
    lr = np.log10([values["optimizer.lr"] for values in drawn])
    assert -4 <= lr.min() < -3.95 and -2.05 < lr.max() <= -2
    assert np.histogram(lr, bins=4)[0].min() > 850  # of 1000: even in the logarithm
    assert abs(np.mean([values["optimizer.weight_decay"] for values in drawn]) - 0.25) < 0.01
    counts = np.unique([values["optimizer.warmup_samples"] for values in drawn], return_counts=True)
    assert counts[0].tolist() == [1, 2, 3, 4] and counts[1].min() > 850
    assert {values["batch_size"] for values in drawn} == {32, 64}


def test_whole_numbers_over_a_logarithm_stay_within_their_ends():
    space = {"batch_size": Range(low=16, high=256, log=True)}
    drawn = np.array([draw(space, 0, i)["batch_size"] for i in range(3000)])
    assert drawn.min() == 16 and drawn.max() <= 256
    assert 0.45 < (drawn < 64).mean() < 0.55


def test_a_trial_is_the_recipe_with_its_values_and_stays_a_short_config(base):
    recipe = TrainConfig.model_validate(base)
    values = draw(SPACE, 0, 1)
    config = trial_config(recipe, "trial-001", values)
    assert config.name == "trial-001"
    assert config.optimizer.lr == values["optimizer.lr"]
    assert list(config.data.crop_scale) == values["data.crop_scale"]
    assert config.samples == 1000 and config.optimizer.betas == recipe.optimizer.betas
    again = config.model_dump(mode="json", exclude_unset=True)
    assert "betas" not in again["optimizer"] and "guard" not in again
    assert TrainConfig.model_validate(again) == config


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimizer.rate": Range(low=1, high=2)}, "unknown key 'optimizer.rate'"),
        ({"optimizer.lr": Range(low=-1.0, high=1.0)}, "'optimizer.lr' is -1.0"),
        ({"batch_size": Choices(choices=(32, "many"))}, "'batch_size' is 'many'"),
        ({"samples": Range(low=1, high=2)}, "'samples' cannot be searched"),
    ],
)
def test_a_space_that_makes_no_run_is_one_line_before_the_start(base, space, message):
    with pytest.raises(UserError, match=message):
        check_space(TrainConfig.model_validate(base), SearchPlan(space=space, num_trials=1))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"algorithm": "asha"}, "grace_samples is for algorithm=asha, which needs it"),
        ({"grace_samples": 200}, "grace_samples is for algorithm=asha, which needs it"),
        ({"stop_by": "shapes.top5"}, "stop_by is for algorithm=asha"),
        ({"algorithm": "asha", "grace_samples": 50}, "every_samples 100 must be at most plan.grace_samples 50"),
        ({"space": {"optimizer.lr": {"low": 2, "high": 1}}}, "low 2 must be below high 1"),
        ({"space": {"optimizer.lr": {"low": 0, "high": 1, "log": True}}}, "log=true needs low above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(sweep, plan, message):
    with pytest.raises(UserError, match=message):
        sweep(**plan)


def test_trials_that_are_stopped_at_their_evaluations_cannot_go_on_meanwhile(base):
    space = {"optimizer.lr": {"low": 1e-4, "high": 1e-3}}
    values = {
        "name": "s",
        "metric": "letters.top1",
        "base": base | {"evaluation": base["evaluation"] | {"asynchronous": True}},
    }
    random = {"kind": "search", "space": space, "num_trials": 1}
    assert validate(SweepConfig, values | {"plan": random}, "test").base.evaluation.is_asynchronous
    asha = random | {"algorithm": "asha", "grace_samples": 200}
    with pytest.raises(UserError, match=r"base.evaluation.asynchronous: a trial waits to hear whether it goes on"):
        validate(SweepConfig, values | {"plan": asha}, "test")


def test_a_metric_that_is_not_measured_is_refused(base):
    plan = {"kind": "search", "space": {"optimizer.lr": {"low": 1e-4, "high": 1e-3}}, "num_trials": 1}
    with pytest.raises(UserError, match=r"metric 'letters\.top9' is not measured; measured: letters\.top1"):
        validate(SweepConfig, {"name": "s", "metric": "letters.top9", "base": base, "plan": plan}, "test")


def test_rows_are_what_a_law_is_fitted_to(tmp_path, base, tiny_config):
    recipe = TrainConfig.model_validate(base)
    cost = count(tiny_config, [3, 5, 5])
    assert cost.parameters == num_parameters(tiny_config)
    assert cost.training_flops == pytest.approx(training_flops(tiny_config, 3, [3, 5, 5]) / 3)
    ended = {
        "samples": 1000, "unique_samples": 300, "train_loss": 2.5, "metrics": {"letters.top1": 0.25}, "error": 0.75,
        "wall_time_s": 4.0, "device": "CPU",
    }  # fmt: skip
    rows = [
        make_row(recipe, cost, "finished", ended),
        make_row(recipe.model_copy(update={"name": "b"}), cost, "failed", {}),
    ]
    write_rows(tmp_path / "rungs.csv", rows)
    fitted, failed = read_csv(tmp_path / "rungs.csv")
    assert (fitted.name, fitted.point.samples, fitted.point.error) == ("base", 1000, 0.75)
    assert fitted.point.gmacs == pytest.approx(forward_gmacs(tiny_config))
    assert failed.name == "b" and failed.point is None
    written = list(csv.DictReader(io.StringIO((tmp_path / "rungs.csv").read_text())))
    assert int(written[0]["training_flops_full_context"]) == training_flops(tiny_config, 1000)
    assert written[0]["letters.top1"] == "0.25" and written[1]["letters.top1"] == ""
