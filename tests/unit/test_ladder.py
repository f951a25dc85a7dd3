"""The plan of a ladder: its runs, their rules, what they cost; and every rung's model takes a step."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayclip.config import LadderConfig, ModelConfig, TextConfig, TrainConfig, VisionConfig
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.models.presets import preset
from rayclip.scaling.flops import forward_gmacs, meta_model, num_parameters, training_flops
from rayclip.scaling.ladder import plan_ladder
from rayclip.training.optimizer import build_optimizer
from rayclip.training.schedule import learning_rate
from rayclip.training.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def shape(width, layers, text_layers):
    return ModelConfig(
        embed_dim=width,
        vision=VisionConfig(image_size=32, patch_size=8, width=width, layers=layers, heads=width // 16),
        text=TextConfig(context_length=32, width=width, layers=text_layers, heads=width // 16),
    )


GLYPHS = {"w48": shape(48, 2, 1), "w80": shape(80, 3, 2), "w112": shape(112, 4, 2), "w160": shape(160, 6, 3)}
BUDGETS = (10_000, 20_000, 40_000, 80_000)


def make_base(**changes):
    values = {
        "name": "glyphs",
        "model": "ViT-Micro/8@32",
        "data": {"path": "data/glyphs/train"},
        "samples": 150_000,
        "batch_size": 64,
        "optimizer": {"lr": 7e-4, "warmup_samples": 10_000},
        "evaluation": {
            "every_samples": 75_000,
            "best": "font.top1",
            "tasks": {"font": {"kind": "zero_shot", "path": "data/glyphs/held_out_font"}},
        },
        "tracking": {"register_as": "glyphs"},
    }
    return TrainConfig.model_validate(values | changes)


def make_plan(base=None, **changes):
    return plan_ladder(
        LadderConfig(**{"shapes": GLYPHS, "samples": BUDGETS} | changes), base or make_base(), "sweeps/a"
    )


# Runs


def test_a_shape_is_a_trunk_and_a_branch_for_each_budget():
    ladder = make_plan()
    assert [trial.name for trial in ladder.trials] == list(GLYPHS)
    trunk, *branches = ladder.trials[1].runs
    assert trunk.name == "w80-trunk"
    assert trunk.optimizer.schedule == "wsd" and trunk.optimizer.cooldown_samples == 0
    assert trunk.evaluation.tasks == {} and trunk.branch_from is None
    points = [8000, 16_000, 32_000, 64_000]
    assert trunk.checkpoint.at_samples == tuple(points) and trunk.samples == points[-1]
    assert [branch.name for branch in branches] == [f"w80-{budget}" for budget in BUDGETS]
    assert [branch.branch_from for branch in branches] == [f"sweeps/a/w80-trunk@{point}" for point in points]
    assert [branch.optimizer.cooldown_samples for branch in branches] == [2000, 4000, 8000, 16_000]
    assert [rung.config for rung in ladder.trials[1].rungs] == branches
    for run in ladder.trials[1].runs:
        assert run.runs == "sweeps/a" and run.model == GLYPHS["w80"] and run.batch_size == 64
        assert run.tracking.register_as is None
    for branch in branches:
        assert list(branch.evaluation.tasks) == ["font"]
        assert branch.evaluation.best is None and branch.evaluation.every_samples is None


@pytest.mark.parametrize("batch_size", [64, 96, 250])
def test_a_branch_begins_at_a_whole_batch_where_its_rate_is_its_trunks(batch_size):
    ladder = make_plan(make_base(batch_size=batch_size))
    for trial in ladder.trials:
        trunk = trial.runs[0]
        for point, branch in zip(trunk.checkpoint.at_samples, trial.runs[1:], strict=True):
            assert point % batch_size == 0
            for seen in range(0, point, batch_size):
                rates = [learning_rate(seen, run.optimizer, run.samples) for run in (trunk, branch)]
                assert rates[0] == rates[1]
            assert learning_rate(point + batch_size, branch.optimizer, branch.samples) < trunk.optimizer.lr


def test_with_a_cosine_every_rung_is_a_trial_of_its_own():
    ladder = make_plan(schedule="cosine")
    assert len(ladder.trials) == len(ladder.rungs) == 16
    assert {len(trial.runs) for trial in ladder.trials} == {1}
    assert {trial.runs[0].optimizer.schedule for trial in ladder.trials} == {"cosine"}
    assert {rung.name for rung in ladder.rungs} == {rung.name for rung in make_plan().rungs}
    assert ladder.flops_total == ladder.flops_separate == make_plan().flops_separate


def test_shares_of_the_data_have_trunks_of_their_own():
    ladder = make_plan(data_fractions=(0.25, 1.0), shapes={"tiny": "ViT-Nano/8@32"})
    assert [trial.name for trial in ladder.trials] == ["tiny-f0.25", "tiny"]
    assert [run.data.fraction for trial in ladder.trials for run in trial.runs] == [0.25] * 5 + [1.0] * 5
    assert [rung.data_fraction for rung in ladder.rungs] == [0.25] * 4 + [1.0] * 4
    assert ladder.rungs[0].name == "tiny-f0.25-10000"
    names = [run.name for trial in ladder.trials for run in trial.runs]
    assert len(set(names)) == len(names)


# Rules


def test_the_rate_follows_the_width_and_clips_own_rates():
    clip = make_base(model="ViT-B/32", optimizer={"lr": 5e-4, "schedule": "cosine"})
    ladder = make_plan(clip, shapes={"B": "ViT-B/16", "L": "ViT-L/14"}, warmup_share=0.0)
    rates = {rung.shape: rung.config.optimizer.lr for rung in ladder.rungs}
    assert rates == pytest.approx({"B": 5e-4, "L": 4e-4}, rel=2e-3)


def test_rules_can_be_set_aside_for_a_shape():
    ladder = make_plan(rates={"w48": 2e-3}, batch_sizes={"w160": 128}, warmup_share=0.05, rate_exponent=1)
    optimizers = {rung.shape: rung.config.optimizer for rung in ladder.rungs}
    assert optimizers["w48"].lr == 2e-3
    assert optimizers["w80"].lr == pytest.approx(7e-4 * 128 / 80)
    assert {optimizer.warmup_samples for optimizer in optimizers.values()} == {500}
    assert {(r.shape, r.config.batch_size) for r in ladder.rungs} == {
        ("w48", 64), ("w80", 64), ("w112", 64), ("w160", 128)
    }  # fmt: skip


def test_what_cannot_be_a_ladder_is_refused():
    for changes, told in [
        ({"rates": {"w49": 1e-3}}, "rates names 'w49', which is none of shapes: w48, w80, w112, w160"),
        ({"samples": (10, 10)}, "samples names one twice"),
        ({"shapes": {"ViT-B/32": "ViT-B/32"}}, "shape 'ViT-B/32' must be letters"),
        ({"data_fractions": (1.5,)}, "less than or equal to 1"),
    ]:
        with pytest.raises(ValidationError, match=told):
            make_plan(**changes)
    with pytest.raises(UserError, match="rung w48-70 is too short: of 70 samples the last 14 are cooldown"):
        make_plan(samples=(70, 10_000))
    with pytest.raises(UserError, match="no model is called 'ViT-Q/8'"):
        make_plan(shapes={"q": "ViT-Q/8"})


# Compute


def test_the_compute_is_that_of_the_samples_trained():
    """Counted again from the runs, a branch from its point on."""
    ladder = make_plan()
    trained = 0
    for trial in ladder.trials:
        for run in trial.runs:
            start = int(run.branch_from.rpartition("@")[2]) if run.branch_from else 0
            trained += training_flops(run.model, run.samples - start)
    assert ladder.flops_total == trained
    assert ladder.flops_separate == sum(training_flops(GLYPHS[r.shape], r.samples) for r in ladder.rungs)
    for rung in ladder.rungs:
        assert rung.training_flops_full_context == training_flops(GLYPHS[rung.shape], rung.samples)
    # Budgets of 1, 1/2, 1/4 and 1/8, whose trunk is 0.8 and whose cooldowns are 0.2 of them.
    assert ladder.share_saved == pytest.approx(1 - (0.8 + 0.2 * 1.875) / 1.875)
    assert {rung.shape: rung.gmacs for rung in ladder.rungs}["w80"] == pytest.approx(0.009669, rel=1e-3)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_dearest_are_left_out_until_the_rest_fits_and_each_is_told(schedule):
    whole = make_plan(schedule=schedule)
    ladder = make_plan(schedule=schedule, max_flops=whole.flops_total / 3)
    assert ladder.flops_total <= whole.flops_total / 3
    kept, left_out = {rung.name for rung in ladder.rungs}, [dropped.name for dropped in ladder.dropped]
    assert kept | set(left_out) == {rung.name for rung in whole.rungs} and not kept & set(left_out)
    dearest_first = sorted(whole.rungs, key=lambda rung: -rung.training_flops_full_context)
    assert left_out == [rung.name for rung in dearest_first[: len(left_out)]]
    assert make_plan(schedule=schedule, max_flops=ladder.flops_total).rungs == ladder.rungs
    assert make_plan(schedule=schedule, max_flops=whole.flops_total).dropped == ()
    assert all("max_flops is" in dropped.reason for dropped in ladder.dropped)
    with pytest.raises(UserError, match="max_flops 1e\\+06 is below the cheapest rung, w48-10000"):
        make_plan(schedule=schedule, max_flops=1e6)


def test_a_trunk_is_no_longer_than_its_longest_branch_needs():
    whole = make_plan()
    ladder = make_plan(max_flops=whole.flops_total / 3)
    for trial in ladder.trials:
        assert trial.runs[0].samples == trial.runs[0].checkpoint.at_samples[-1]
        assert len(trial.runs[0].checkpoint.at_samples) == len(trial.rungs)


# Dry runs


def made_up_batch(model, count=4):
    """Random pictures, and captions of 3 to 6 tokens that end in the end token."""
    generator = np.random.default_rng(0)
    side = model.vision.image_size
    tokens = np.zeros((count, model.text.context_length), dtype=np.int32)
    lengths = np.arange(count, dtype=np.int32) % 4 + 3
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = generator.integers(1, 49_000, length - 1)
        tokens[row, length - 1] = 49_407
    return {
        "image": generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        "tokens": tokens,
        "num_tokens": lengths,
        "position": np.zeros(count, dtype=np.int64),
        "row": np.arange(count, dtype=np.int32),
        "cause": np.zeros(count, dtype=np.int8),
    }


@pytest.mark.parametrize("name", GLYPHS)
def test_every_rung_is_dry_run(name):
    rungs = [rung for rung in make_plan(data_fractions=(0.5, 1.0)).rungs if rung.shape == name]
    assert len(rungs) == 8
    for rung in rungs:
        assert TrainConfig.model_validate(rung.config.model_dump(mode="json")) == rung.config
        assert sum(p.numel() for p in meta_model(rung.config.model).parameters()) == num_parameters(GLYPHS[name])
        assert rung.gmacs == forward_gmacs(rung.config.model) > 0
    settings, before = rungs[0].config, torch.get_rng_state()
    torch.manual_seed(0)
    model = CLIP(settings.model)
    torch.set_rng_state(before)
    optimizer, weights = build_optimizer(model, settings.optimizer), model.visual.conv1.weight.detach().clone()
    result = train_step(model, model, optimizer, made_up_batch(settings.model), settings.optimizer.lr, None)
    assert 0 < result.loss < 10
    assert not torch.equal(model.visual.conv1.weight, weights)


def test_a_rung_of_a_preset_has_its_model_in_full():
    ladder = make_plan(shapes={"nano": "ViT-Nano/8@32"}, samples=(10_000,))
    assert ladder.rungs[0].config.model == preset("ViT-Nano/8@32")
    assert ladder.share_saved == 0
