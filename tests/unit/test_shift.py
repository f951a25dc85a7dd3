"""Shifts in suites: cost and line beside SciPy's regression, where other models come from, mistakes as one line."""

import json

import pytest
from scipy import stats
from scipy.special import expit, logit

from rayclip.config import SuiteConfig
from rayclip.errors import UserError
from rayclip.evaluation.corruptions import CORRUPTIONS
from rayclip.evaluation.shift import read_baselines, shift_report


def result(accuracy, num):
    """A data set's result with that accuracy."""
    half = 1.96 * (accuracy * (1 - accuracy) / num) ** 0.5
    top1 = {"value": accuracy, "low": accuracy - half, "high": accuracy + half}
    return {"num_samples": num, "zero_shot": {"figures": {"top1": top1}}}


RESULTS_ACCURACIES = {"plain": 0.6, "moved": 0.5}
RESULTS = {"plain": result(0.6, 2000), "moved": result(0.5, 1000)}
ACCURACIES = [0.3, 0.45, 0.55, 0.7, 0.8]
OTHERS = {
    f"m{i}": {"plain": a, "moved": float(expit(logit(a) - 0.8 + 0.1 * (-1) ** i))} for i, a in enumerate(ACCURACIES)
}


def test_effective_robustness_is_the_distance_from_scipys_line(tmp_path):
    told = shift_report("moved", "plain", RESULTS, "mine", OTHERS, tmp_path / "picture.png")
    columns = [logit([o[name] for o in OTHERS.values()]) for name in ("plain", "moved")]
    line = stats.linregress(*columns)
    expected = expit(line.intercept + line.slope * logit(0.6))
    assert told["effective_robustness"]["value"] == pytest.approx(0.5 - expected, abs=1e-4)
    assert told["change"]["value"] == pytest.approx(-0.1)
    spread = (0.6 * 0.4 / 2000 + 0.5 * 0.5 / 1000) ** 0.5
    assert told["change"]["high"] - told["change"]["value"] == pytest.approx(1.96 * spread)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_is_not_its_own_baseline_and_two_give_no_line(tmp_path):
    others = {name: OTHERS[name] for name in ("m0", "m1")} | {"mine": RESULTS_ACCURACIES, "elsewhere": {"plain": 0.5}}
    told = shift_report("moved", "plain", RESULTS, "mine", others, tmp_path / "picture.png")
    assert told["num_models"] == 2
    assert "effective_robustness" not in told
    assert told["change"]["value"] == pytest.approx(-0.1)


def test_other_models_come_from_reports_and_csvs(tmp_path):
    (tmp_path / "reports" / "a").mkdir(parents=True)
    summary = {"model_version": "a", "datasets": RESULTS}
    (tmp_path / "reports" / "a" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "more.csv").write_text("model,plain,moved\nb,0.7,0.4\nc,0.5,\n")
    found = read_baselines([str(tmp_path / "reports"), str(tmp_path / "more.csv")])
    assert found == {"a": RESULTS_ACCURACIES, "b": {"plain": 0.7, "moved": 0.4}, "c": {"plain": 0.5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,plain\nb,0.7\n", "needs a column 'model'"),
        ("model,plain\nb,70\n", "line 2: accuracy of 'plain' must lie inside 0..1, got 70"),
        ("model,plain\nb,good\n", "line 2: accuracies must be numbers, got good"),
        (None, "no file '.*others.csv'"),
    ],
)
def test_a_bad_csv_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "others.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_baselines([str(tmp_path / "others.csv")])


def test_a_shift_of_what_is_not_in_the_suite_is_refused():
    with pytest.raises(ValueError, match="'a' is a shift of 'c', which is not in the suite: b"):
        SuiteConfig.model_validate({"name": "s", "model": "m", "datasets": {"a": {"shift_of": "c"}, "b": {}}})


def test_corruptions_of_a_suite_are_all_there_are():
    suite = SuiteConfig.model_validate({"name": "s", "model": "m", "datasets": {"a": {}}})
    assert suite.datasets["a"].corruptions == tuple(CORRUPTIONS)
