"""Plans: the paper's days, targets and budgets that agree with each other, and one line for what cannot be answered."""

import json

import numpy as np
import pytest

from rayclip.cli.fit import main as fit
from rayclip.cli.plan import main
from rayclip.config import FitConfig, PlanConfig
from rayclip.config.loader import load
from rayclip.errors import UserError

SPEED = {"flops_per_gpu_s": 1e14, "num_gpus": 8}


def plan(**settings):
    return main(PlanConfig(**{**SPEED, **settings}))


def write_fit(folder, form, error, **settings):
    """A fit of 30 runs without noise to speak of; their sizes grow as the square root of their compute."""
    generator = np.random.default_rng(3)
    lines = ["name,gmacs,samples,error"]
    for i, compute in enumerate(np.geomspace(1e7, 1e11, 30)):
        gmacs = 1e-5 * compute**0.5 * 10 ** generator.uniform(-0.3, 0.3)
        noise = np.exp(generator.normal(0, 0.005))
        lines.append(f"run{i},{gmacs},{compute / gmacs},{error(gmacs, compute / gmacs) * noise}")
    (folder / "runs.csv").write_text("\n".join(lines))
    config = FitConfig(source=str(folder / "runs.csv"), form=form, resamples=200, output=str(folder), **settings)
    (folder / "summary.json").write_text(json.dumps(fit(config)))
    return str(folder)


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    return write_fit(tmp_path_factory.mktemp("law"), "power_limit", lambda n, d: 0.12 + 40 * (n * d) ** -0.25)


def test_the_papers_vit_l14_takes_12_days():
    config = load(PlanConfig, "platform/rayclip/recipes/plan_vit_l14.yaml", [])
    summary = main(config)
    assert summary["days"]["value"] == pytest.approx(12, rel=0.15)
    assert summary["epochs"] == 32 and summary["batch_size"] == 32_768
    assert summary["error"] is None and summary["times_the_largest_run"] is None


def test_a_budget_is_the_same_in_hours_days_and_money():
    by_hours = plan(model="ViT-B/32", gpu_hours=1920)
    assert by_hours["days"]["value"] == pytest.approx(10)
    for settings in ({"days": 10}, {"money": 3840, "price_per_gpu_hour": 2}):
        same = plan(model="ViT-B/32", **settings)
        assert same["samples"]["value"] == pytest.approx(by_hours["samples"]["value"])
    back = plan(model="ViT-B/32", samples=by_hours["samples"]["value"])
    assert back["gpu_hours"]["value"] == pytest.approx(1920)


def test_loaders_storage_and_throughput_follow_the_measured_speed(tmp_path):
    (tmp_path / "summary.json").write_text('{"samples_per_s": 500.0}')
    settings = {"flops_per_gpu_s": None, "run": str(tmp_path / "summary.json"), "measured_gpus": 1}
    summary = plan(model="ViT-B/32", samples=1e9, loader_samples_per_core_s=150, bytes_per_pair=2e4, **settings)
    assert summary["samples_per_s"] == pytest.approx(4000)
    assert summary["loader_cores"] == 27 and summary["read_mb_per_s"] == pytest.approx(80)
    assert summary["days"]["value"] == pytest.approx(1e9 / 4000 / 86400)


def test_a_target_and_the_budget_it_asks_for_agree(law):
    target = plan(law=law, target_error=0.15)
    truth = (0.03 / 40) ** -4
    assert target["compute"]["low"] < truth < target["compute"]["high"]
    budget = plan(law=law, gpu_hours=target["gpu_hours"]["value"])
    assert budget["error"]["value"] == pytest.approx(0.15)
    assert budget["error"]["low"] < 0.15 < budget["error"]["high"]
    assert budget["samples"]["value"] == pytest.approx(target["samples"]["value"])
    assert any("frontier" in note for note in target["notes"])
    # A size that is no preset's takes the checkpoint of the nearest, and says so.
    assert target["model"] is None and any(target["nearest_preset"] in note for note in target["notes"])
    named = plan(law=law, target_error=0.15, model=target["nearest_preset"])
    assert named["checkpoint_bytes"] == target["checkpoint_bytes"] > 1e6
    assert named["gmacs"] == pytest.approx(target["gmacs"], rel=0.6)
    assert target["times_the_largest_run"] == pytest.approx(target["compute"]["value"] / 1e11, rel=1e-3)
    assert any("extrapolated" in note for note in target["notes"])


def test_chinchilla_splits_a_budget_as_its_law_does(tmp_path):
    law = write_fit(tmp_path, "chinchilla", lambda n, d: 0.1 + 0.3 * n**-0.3 + 40 * d**-0.3)
    summary = plan(law=law, gpu_hours=1e12 * 6e9 / 1e14 / 3600)
    best = (1e12 * (0.3 / 40) ** (1 / 0.3)) ** 0.5
    assert summary["compute"]["value"] == pytest.approx(1e12)
    assert summary["gmacs"] == pytest.approx(best, rel=0.3)
    assert any("the law's best" in note for note in summary["notes"])


def test_what_cannot_be_answered_is_one_line(law, tmp_path):
    with pytest.raises(UserError, match="out of reach: the law's limit"):
        plan(law=law, target_error=0.1)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="is no summary of"):
        plan(law=str(tmp_path / "bad.json"), target_error=0.2)
    with pytest.raises(UserError, match="too little to plan with"):
        plan(model="ViT-B/32")
    with pytest.raises(UserError, match="neither a model nor a law"):
        plan(gpu_hours=5)
    with pytest.raises(UserError, match="gpu 'H10' is not known"):
        plan(flops_per_gpu_s=None, gpu="H10", model="ViT-B/32", samples=1e9)
    with pytest.raises(UserError, match="target_error needs a law"):
        load(PlanConfig, None, ["target_error=0.2", "gpu=H100"])
    with pytest.raises(UserError, match="give one of target_error, days"):
        load(PlanConfig, None, ["target_error=0.2", "days=3", "gpu=H100", f"law={law}"])
