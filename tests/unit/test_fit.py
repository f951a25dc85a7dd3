"""Scaling laws: known ones come back, intervals cover, misfits and too little are said, no run is lost silently."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import coverage as coverage_of
from rayclip.cli.fit import main
from rayclip.config import FitConfig
from rayclip.config.loader import load
from rayclip.errors import UserError
from rayclip.scaling.fit import NotEnoughError, fit_law, flags, misfit_p, selection_bias, why_no_limit
from rayclip.scaling.flops import forward_gmacs
from rayclip.scaling.forms import Form
from rayclip.scaling.frontier import select
from rayclip.scaling.holdout import hold_out
from rayclip.scaling.intervals import tail_probability
from rayclip.scaling.points import Point, Run, make_run, read_csv
from rayclip.scaling.report import make_report
from rayclip.tracking.experiment import read_runs
from rayclip.tracking.mlflow import close_run, connect, connect_existing, open_run


def power(gmacs, samples):
    return 5.858 * (gmacs * samples) ** -0.111


def power_limit(gmacs, samples):
    return 0.12 + 40 * (gmacs * samples) ** -0.25


def shifted_limit(gmacs, samples):
    return 0.12 + 40 * (gmacs * samples + 1e8) ** -0.25


def chinchilla(gmacs, samples):
    return 0.1 + 0.3 * gmacs**-0.3 + 40 * samples**-0.3


TRUTH = {
    "power": (power, {"coefficient": 5.858, "exponent": 0.111, "limit": 0}),
    "power_limit": (power_limit, {"coefficient": 40, "exponent": 0.25, "limit": 0.12}),
    "shifted_limit": (shifted_limit, {"coefficient": 40, "exponent": 0.25, "limit": 0.12, "shift": 1e8}),
    "chinchilla": (
        chinchilla,
        {
            "limit": 0.1,
            "exponent": 0.15,
            "size_coefficient": 0.3,
            "size_exponent": 0.3,
            "samples_coefficient": 40,
            "samples_exponent": 0.3,
            "best_gmacs_exponent": 0.5,
        },
    ),
}


def draw(law, count, noise, generator):
    """Runs about a law: models of 0.1 to 100 GMACs, 1M to 3B samples, errors off by a share `noise`."""
    gmacs, samples = 10 ** generator.uniform(-1, 2, count), 10 ** generator.uniform(6, 9.5, count)
    error = law(gmacs, samples) * np.exp(noise * generator.standard_normal(count))
    return [Point(*map(float, values)) for values in zip(gmacs, samples, error, strict=True)]


def config(form="power", **settings):
    return FitConfig(source="-", form=form, **settings)


def write(path, points, extra=()):
    rows = [f"run{i},{p.gmacs!r},{p.samples!r},{p.error!r}" for i, p in enumerate(points)]
    path.write_text("\n".join(["name,gmacs,samples,error", *rows, *extra]) + "\n")
    return str(path)


# Forms


@pytest.mark.parametrize("form", TRUTH)
def test_a_known_law_comes_back(form):
    law, truth = TRUTH[form]
    points = draw(law, 30, 0.0, np.random.default_rng(0))
    fitted = fit_law(points, config(form, resamples=100))
    estimates = fitted.estimates()
    for name, value in truth.items():
        assert estimates[name].value == pytest.approx(value, rel=1e-4, abs=1e-9), name
        assert estimates[name].low == pytest.approx(value, rel=1e-3, abs=1e-9), name
    assert fitted.error_at(7.4, 1e10).value == pytest.approx(law(7.4, 1e10), rel=1e-4)
    assert misfit_p(fitted) > 0.01


@pytest.mark.parametrize("form", TRUTH)
def test_the_jacobian_is_that_of_finite_differences(form):
    compute, gmacs, error = np.log(
        [(p.compute, p.gmacs, p.error) for p in draw(power, 9, 0.1, np.random.default_rng(1))]
    ).T
    runs = select("all", 5, compute, gmacs, error, np.arange(9)[None])
    shape = Form.of(form, runs)
    theta = np.array([[0.1, -0.7, 0.2, *{"shifted_limit": [0.5], "chinchilla": [-1.0, 0.3]}.get(form, [])]])
    z = shape.coordinates(runs)
    analytic = shape.jacobian(theta, z)[0]
    for k in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, k] = 1e-6
        numeric = (shape.log_error(theta + step, z) - shape.log_error(theta - step, z))[0] / 2e-6
        np.testing.assert_allclose(analytic[:, k], numeric, atol=1e-7)


def test_the_best_model_for_a_budget_is_that_of_a_search():
    points = draw(chinchilla, 30, 0.0, np.random.default_rng(0))
    fitted = fit_law(points, config("chinchilla", resamples=100))
    budget = 1e11
    gmacs = np.geomspace(1, 1e4, 200_001)
    searched = chinchilla(gmacs, budget / gmacs)
    best, samples = fitted.best_model(budget)
    assert best.value == pytest.approx(gmacs[searched.argmin()], rel=1e-3)
    assert best.value * samples.value == pytest.approx(budget)
    assert fitted.best_error(budget).value == pytest.approx(searched.min(), rel=1e-4)
    assert fit_law(points, config(resamples=100)).best_model(budget) is None


def test_a_run_far_off_moves_a_robust_form_little():
    generator = np.random.default_rng(0)
    points = draw(power_limit, 30, 0.01, generator)
    points[7] = Point(points[7].gmacs, points[7].samples, 2 * points[7].error)
    assert fit_law(points, config("power_limit", resamples=100)).estimates()["limit"].value == pytest.approx(
        0.12, abs=0.02
    )


# Frontiers


def chosen(frontier, points, bins=5):
    compute, gmacs, error = np.log([(p.compute, p.gmacs, p.error) for p in points]).T
    runs = select(frontier, bins, compute, gmacs, error, np.arange(len(points))[None])
    kept = runs.weight[0] > 0
    return runs.run[0][kept].tolist(), np.exp(runs.compute[0][kept]), np.exp(runs.error[0][kept])


def test_the_strict_pareto_frontier():
    costs_and_errors = [(1, 0.9), (2, 0.8), (3, 0.8), (4, 0.85), (5, 0.6), (5, 0.7), (5, 0.6)]
    assert chosen("pareto", [Point(c, 1, e) for c, e in costs_and_errors])[0] == [0, 1, 4]


def test_five_bins_by_hand():
    """From 10^0 to 10^4.9 and 0.1 beyond: edges at 0, 1, 2, 3, 4, 5 decades; the fourth bin is empty."""
    points = [
        Point(10**d, 1, e)
        for d, e in [(0, 0.9), (0.9, 0.8), (1.5, 0.7), (1.6, 0.75), (2.5, 0.6), (4.2, 0.5), (4.9, 0.45)]
    ]
    runs, centres, errors = chosen("bins", points)
    assert runs == [1, 2, 4, 6]
    np.testing.assert_allclose(np.log10(centres), [0.5, 1.5, 2.5, 4.5])
    np.testing.assert_allclose(errors, [0.8, 0.7, 0.6, 0.45])
    law = fit_law(points, config(frontier="bins", resamples=100))
    slope, at_one = np.polyfit(np.log(centres), np.log(errors), 1)
    assert law.estimates()["exponent"].value == pytest.approx(-slope)
    assert law.estimates()["coefficient"].value == pytest.approx(np.exp(at_one))


def test_a_resample_selects_its_own_frontier():
    compute, error = np.log([1.0, 2.0, 4.0]), np.log([0.9, 0.5, 0.6])
    runs = select("pareto", 5, compute, compute, error, np.array([[0, 1, 2], [2, 0, 0], [2, 2, 2]]))
    assert [set(row[weight > 0].tolist()) for row, weight in zip(runs.run, runs.weight, strict=True)] == [
        {0, 1},
        {0, 2},
        {2},
    ]
    assert runs.weight.sum(axis=1).tolist() == [2, 2, 1]


# Intervals


def coverage(form, count, noise, draws, **settings):
    law, truth = TRUTH[form]
    generator = np.random.default_rng(0)
    hits = dict.fromkeys(truth, 0)
    for _ in range(draws):
        estimates = fit_law(draw(law, count, noise, generator), config(form, **settings)).estimates()
        for name, value in truth.items():
            hits[name] += estimates[name].low <= value <= estimates[name].high
    return {name: number / draws for name, number in hits.items()}


@pytest.mark.parametrize("count", [12, 20])
def test_intervals_of_a_power_law_cover_95_percent_of_300_draws(count):
    shares = coverage("power", count, 0.02, 300, resamples=1000)
    assert 0.93 <= shares["exponent"] <= 0.97
    assert 0.93 <= shares["coefficient"] <= 0.97


@pytest.mark.parametrize(("frontier", "count", "noise"), [("pareto", 20, 0.02), ("pareto", 40, 0.1), ("bins", 40, 0.1)])
def test_intervals_of_a_picked_frontier_cover_95_percent_of_300_draws(frontier, count, noise):
    shares = coverage_of("power", frontier, count, noise, 300)
    assert 0.93 <= shares["exponent"] <= 0.97, shares
    assert 0.93 <= shares["coefficient"] <= 0.97, shares


def test_a_frontier_of_noise_is_set_right_and_one_of_better_runs_is_left_alone():
    """By noise the least of eight runs a bin lies about 1.4 deviations low; where most runs are worse by far more than
    noise, the frontier is the law."""
    generator = np.random.default_rng(0)
    noisy = draw(power, 40, 0.1, generator)
    assert 0.08 < selection_bias(fit_law(noisy, config(frontier="bins", resamples=400))) < 0.35
    runs = draw(power, 60, 0.005, generator)
    worse = [replace(p, error=1.8 * p.error) if i % 3 and p.compute > 1e7 else p for i, p in enumerate(runs)]
    law = fit_law(worse, config(frontier="pareto", resamples=400))
    assert selection_bias(law) is None
    exponent = law.estimates()["exponent"]
    assert exponent.low <= 0.111 <= exponent.high and exponent.high - exponent.low < 0.02, exponent


@pytest.mark.statistics
@pytest.mark.parametrize(
    ("form", "frontier", "count"),
    [("power_limit", "all", 20), ("power_limit", "bins", 20), ("shifted_limit", "bins", 40), ("chinchilla", "all", 24)],
)
def test_intervals_of_a_law_with_a_limit_cover_95_percent_of_1000_draws(form, frontier, count):
    """Which have a standard error of 0.7 points."""
    shares = coverage_of(form, frontier, count, 0.01, 1000)
    assert all(0.92 <= shares[name] <= 0.98 for name in TRUTH[form][1] if name in shares), shares


def test_fewer_and_noisier_runs_widen_the_interval():
    def width(count, noise):
        widths = []
        for seed in range(10):
            points = draw(power, count, noise, np.random.default_rng(seed))
            exponent = fit_law(points, config(resamples=500)).estimates()["exponent"]
            widths.append(exponent.high - exponent.low)
        return float(np.mean(widths))

    assert width(40, 0.02) < width(20, 0.02) < width(10, 0.02)
    assert width(20, 0.01) < width(20, 0.02) < width(20, 0.04)


def test_few_runs_are_taken_further_out_and_many_are_not():
    assert tail_probability(10_000) == pytest.approx(0.025, rel=1e-2)
    assert tail_probability(4) == pytest.approx(0.00275, rel=1e-2)  # of a normal, beyond Student's 2.776 for 4
    assert tail_probability(4, stretch=1.5) < 0.0001


def test_intervals_of_all_runs_of_a_line_are_those_of_linear_regression():
    """Student's t and the covariance of least squares, but for what 20,000 resamples leave to chance."""
    points = draw(power, 15, 0.02, np.random.default_rng(3))
    exponent = fit_law(points, config(resamples=20_000)).estimates()["exponent"]
    line = stats.linregress(*np.log([(p.compute, p.error) for p in points]).T)
    half = stats.t.ppf(0.975, 13) * line.stderr
    assert exponent.value == pytest.approx(-line.slope)
    assert exponent.value - exponent.low == pytest.approx(half, rel=0.06)
    assert exponent.high - exponent.value == pytest.approx(half, rel=0.06)


# What cannot be said


def test_a_form_that_does_not_fit_is_flagged():
    fitted = fit_law(draw(power_limit, 30, 0.01, np.random.default_rng(0)), config(resamples=200))
    assert any(flag.startswith("misfit") for flag in flags(fitted))
    for form in TRUTH:
        right = fit_law(draw(TRUTH[form][0], 30, 0.01, np.random.default_rng(0)), config(form, resamples=200))
        assert not any(flag.startswith("misfit") for flag in flags(right)), form


def test_without_curvature_there_is_no_limit():
    fitted = fit_law(draw(power, 12, 0.02, np.random.default_rng(0)), config("power_limit", resamples=200))
    assert why_no_limit(fitted).startswith("not enough: a law without a limit fits as well (p = ")
    curved = fit_law(draw(power_limit, 30, 0.01, np.random.default_rng(0)), config("power_limit", resamples=200))
    assert why_no_limit(curved) == ""


def test_a_limit_that_wants_to_be_negative_is_said():
    """Errors that fall ever faster."""
    compute = np.geomspace(1e6, 1e10, 12)
    error = 0.9 * np.exp(-0.02 * np.log(compute / 1e6) ** 2)
    points = [Point(1, float(c), float(e)) for c, e in zip(compute, error, strict=True)]
    said = flags(fit_law(points, config("power_limit", resamples=200)))
    assert "bound hit: limit" in said
    assert any(flag.startswith("misfit") for flag in said)


@pytest.mark.parametrize(
    ("form", "points", "reason"),
    [
        ("power", [], "not enough points: there are none"),
        ("power", [(1, 1e6), (1, 1e7), (1, 1e8)], "not enough points: 3 to fit, power needs 4"),
        ("power", [(1, 1e6), (1, 1e6), (1, 1e7), (1, 1e7)], "2 different amounts of compute, power needs 3"),
        ("chinchilla", [(g, s) for g in (1, 2) for s in (1e6, 1e7, 1e8, 1e9)], "2 different models' GMACs"),
        ("chinchilla", [(g, s) for g in (1, 2, 3, 4) for s in (1e6, 1e7)], "2 different numbers of samples"),
    ],
)
def test_too_little_is_said_and_no_number_given(form, points, reason):
    with pytest.raises(NotEnoughError, match=reason):
        fit_law([Point(g, s, power(g, s)) for g, s in points], config(form))


# Hold-out


def test_a_law_foretells_the_runs_above_and_a_straight_line_does_not():
    points = [Point(1, float(s), float(power(1, s))) for s in np.geomspace(1e7, 1e11, 17)]
    held = hold_out(points, config())
    assert [h.divisor for h in held] == [2, 4, 8]
    assert [len(h.runs) for h in held] == [2, 3, 4]
    for h in held:
        largest = max(p.compute for p in points if p.compute <= 1e11 / h.divisor)
        assert [run.factor for run in h.runs] == pytest.approx([points[run.index].compute / largest for run in h.runs])
        assert all(run.predicted == pytest.approx(run.measured) for run in h.runs)
        assert h.error < 1e-9 < h.baseline_error


def test_the_baseline_is_a_line_of_the_error_over_log_compute():
    points = [Point(1, float(s), float(0.9 - 0.03 * np.log(s / 1e6))) for s in np.geomspace(1e6, 1e9, 13)]
    held = hold_out(points, config())[2]
    assert held.baseline_error == pytest.approx(0, abs=1e-12)
    assert held.error > 0.001
    assert held.as_dict([f"run{i}" for i in range(13)])["nearer_than_baseline"] is False


def test_a_holdout_that_leaves_too_little_says_so():
    points = [Point(1, s, power(1, s)) for s in (1e8, 2e8, 4e8, 8e8, 1e10)]
    assert [h.reason for h in hold_out(points, config())] == [""] * 3
    few = hold_out(points[:4], config())
    reasons = [f"not enough points: {count} to fit, power needs 4" for count in (3, 2, 1)]
    assert [h.reason for h in few] == reasons
    assert few[0].as_dict([])["error"] is None


# Sources


def test_every_bad_row_is_named_with_its_reason(tmp_path):
    (tmp_path / "runs.csv").write_text(
        "\ufeffname, gmacs ,samples,error,params\n"
        "good,7.4,1e9,0.4,151\n"
        "no samples,7.4,,0.4,151\n"
        "word,many,1e9,0.4,151\n"
        "nothing,7.4,1e9,0,151\n"
        "not finite,7.4,inf,0.4,151\n"
        "percent,7.4,1e9,40,151\n"
        "short,7.4\n"
        "\n"
        "good,7.4,1e9,0.4,151\n"
        ",7.4,-1,0.4,151\n"
    )
    runs = read_csv(tmp_path / "runs.csv")
    assert runs[0].point == Point(7.4, 1e9, 0.4)
    assert {run.name: run.reason for run in runs[1:]} == {
        "no samples": "samples is missing",
        "word": "gmacs 'many' is no number",
        "nothing": "error is 0: it must be a number above 0",
        "not finite": "samples is inf: it must be a number above 0",
        "percent": "error 40 is above 1: it must be a share, not percent",
        "short": "line 8 has 2 cells where the header has 5",
        "good": "a copy of a row above",
        "line 11": "samples is -1: it must be a number above 0",
    }


def test_one_data_set_of_several(tmp_path):
    (tmp_path / "runs.csv").write_text("name,gmacs,samples,error,dataset\na,1,1,.5,wit\nb,1,2,.4,open\n")
    runs = read_csv(tmp_path / "runs.csv", "open")
    assert [(run.name, run.reason) for run in runs] == [("a", "dataset is 'wit', not 'open'"), ("b", "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"", "has no column name, gmacs, samples, error; it has: none"),
        (b"name,gmacs,samples\n", "has no column error; it has: name, gmacs, samples"),
        (b"\xff\xfe", "cannot be read as a CSV"),
    ],
)
def test_a_csv_that_cannot_be_used_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "runs.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_csv(tmp_path / "runs.csv")
    assert "\n" not in str(caught.value)


def test_chinchilla_takes_all_runs():
    with pytest.raises(UserError, match="form=chinchilla is a law of all runs"):
        load(FitConfig, None, ["source=runs.csv", "form=chinchilla", "frontier=pareto"])


def test_how_often_runs_repeat_their_data_is_said(tmp_path, capsys):
    rows = [
        f"run{i},1,{s},{power(1, s)},{u}" for i, (s, u) in enumerate([(1e8, 1e8), (4e8, 2e8), (1e9, 2e8), (2e9, "")])
    ]
    (tmp_path / "runs.csv").write_text(
        "\n".join(["name,gmacs,samples,error,unique_samples", *rows, "bad,1,1e9,.3,all"])
    )
    summary = main(FitConfig(source=str(tmp_path / "runs.csv"), resamples=100, output=str(tmp_path / "out")))
    assert summary["repeats"] == {"runs": 2, "told": 3, "least": 2, "most": 5}
    assert summary["dropped"] == [{"name": "bad", "reason": "unique_samples 'all' is no number"}]
    assert "2 of the 3 runs that say it saw their samples more than once, 2 to 5 times" in capsys.readouterr().out


# The job


def test_the_published_law_of_open_data_comes_from_its_published_points():
    """Cherti et al., 2022: 5.858 C^-0.111 of 29 open models in five bins, 23.18 C^-0.164 through OpenAI's three."""
    source = Path("tests/data/cherti_imagenet.csv")
    usable = [run.point for run in read_csv(source, "LAION") if run.point]
    assert len(usable) == 29
    law = fit_law(usable, config(frontier="bins", bins=5, resamples=100)).estimates()
    assert law["coefficient"].value == pytest.approx(5.858, abs=5e-4)
    assert law["exponent"].value == pytest.approx(0.111, abs=5e-4)
    wit = [run.point for run in read_csv(source, "CLIP-WIT") if run.point]
    slope, at_one = np.polyfit(np.log([p.compute for p in wit]), np.log([p.error for p in wit]), 1)
    assert (np.exp(at_one), -slope) == pytest.approx((23.18, 0.164), rel=2e-3)
    with pytest.raises(NotEnoughError, match="3 to fit, power needs 4"):
        fit_law(wit, config())


def test_the_job_from_a_csv(tmp_path, capsys):
    points = draw(power, 20, 0.02, np.random.default_rng(0))
    source = write(tmp_path / "runs.csv", points, ["broken,1,1e9,", "worse,1000,1e12,0.9"])
    settings = {"source": source, "frontier": "pareto", "resamples": 300, "budget": 1e13}
    summary = main(FitConfig(**settings, output=str(tmp_path / "a")))
    again = main(FitConfig(**settings, output=str(tmp_path / "b")))
    assert json.dumps(summary) == json.dumps(again)
    for name in ("law.png", "points.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert set(summary["exponent"]) == {"value", "low", "high", "reason"}
    assert summary["exponent"]["low"] <= 0.111 <= summary["exponent"]["high"]
    assert summary["limit"] == {"value": None, "low": None, "high": None, "reason": "the form has none"}
    assert summary["plan"]["error"]["value"] > 0
    assert summary["plan"]["gmacs"]["value"] is None
    reasons = {entry["name"]: entry["reason"] for entry in summary["dropped"]}
    assert reasons["broken"] == "error is missing"
    assert reasons["worse"].startswith("not on the frontier: 'run")
    assert summary["num_fitted"] + len(reasons) == summary["num_runs"] == 22
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "a" / "points.csv").open())}
    assert {name for name, row in rows.items() if row["fitted"] == "no"} == set(reasons)
    printed = capsys.readouterr().out
    for word in ("exponent", "narrow: ", "fitted below largest/8", "broken: error is missing", "at C = 1e+13"):
        assert word in printed


def test_the_job_gives_no_number_where_there_is_too_little(tmp_path, capsys):
    source = write(tmp_path / "runs.csv", [Point(1, s, power(1, s)) for s in (1e8, 1e9, 1e10)])
    summary = main(FitConfig(source=source, output=str(tmp_path / "out"), budget=1e11))
    reason = "not enough points: 3 to fit, power needs 4"
    for name in ("coefficient", "exponent", "limit"):
        assert summary[name] == {"value": None, "low": None, "high": None, "reason": reason}
    assert summary["flags"] == [reason]
    assert (tmp_path / "out" / "law.png").stat().st_size > 1000
    assert reason in capsys.readouterr().out
    write(tmp_path / "runs.csv", [], ["broken,1,1e9,"])
    with pytest.raises(UserError, match=r"none of the 1 runs of .* can be used: broken: error is missing"):
        main(FitConfig(source=source, output=str(tmp_path / "out")))


def test_the_job_from_an_experiment_and_back_into_it(tmp_path, tiny_config):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    settings = {"model": tiny_config.model_dump(mode="json"), "weights": None}
    gmacs = forward_gmacs(tiny_config)

    def log(name, samples, settings=settings, ended=True, key="evaluation/letters.top1"):
        run_id = open_run(uri, "ladder", name, settings, {}, None)
        client.log_metric(run_id, key, 0.01, step=1)
        client.log_metric(run_id, key, 1 - power(gmacs, samples), step=int(samples))
        close_run(uri, run_id, ended)

    for i, samples in enumerate((1e11, 4e11, 1e12, 5e12, 1e13)):
        log(f"rung{i}", samples)
    log("crashed", 1e12, ended=False)
    log("tuned", 1e12, settings | {"weights": "models:/clip@best"})
    log("unmeasured", 1e12, key="evaluation/other.top5")
    log("foreign", 1e12, {"weights": None, "model": {"width": 3}})
    given = FitConfig(source="ladder", tracking_uri=uri, resamples=100, output=str(tmp_path / "out"))
    summary = main(given)
    assert summary["exponent"]["value"] == pytest.approx(0.111)
    assert summary["coefficient"]["value"] == pytest.approx(5.858)
    reasons = {entry["name"]: entry["reason"] for entry in summary["dropped"]}
    assert reasons["crashed"] == "its status is FAILED, not FINISHED"
    assert reasons["tuned"] == "it began with weights that had seen samples before: models:/clip@best"
    assert reasons["unmeasured"] == "it has not measured letters.top1"
    assert reasons["foreign"].startswith("its model cannot be read: ")
    assert len(reasons) == 4
    # The fit is logged beside the runs, and is no run of the next fit.
    experiment = client.get_experiment_by_name("ladder")
    logged = client.search_runs([experiment.experiment_id], filter_string="tags.kind = 'fit'")[0]
    assert logged.data.metrics["fit/exponent"] == pytest.approx(0.111)
    files = {file.path for file in client.list_artifacts(logged.info.run_id)}
    assert files == {"config.json", "law.png", "points.csv"}
    assert len(read_runs(connect_existing(uri), "ladder")) == 9
    assert json.dumps(main(given)) == json.dumps(summary)
    with pytest.raises(UserError, match=r"has measured 'letters.top5'; measured: letters.top1, other.top5"):
        main(given.model_copy(update={"metric": "letters.top5"}))
    with pytest.raises(UserError, match=r"no experiment 'laddr' in .*: did you mean 'ladder'"):
        main(given.model_copy(update={"source": "laddr"}))
    log("second", 1e12, key="evaluation/symbols.top1")
    with pytest.raises(UserError, match=r"give metric=letters.top1 or metric=symbols.top1"):
        main(given)


def test_an_experiment_without_a_database_makes_none(tmp_path):
    with pytest.raises(UserError, match="no MLflow database at"):
        main(FitConfig(source="ladder", tracking_uri=f"sqlite:///{tmp_path}/none.db"))
    assert not (tmp_path / "none.db").exists()


def rising():
    return [Run(str(i), Point(1 + i // 2, 1e6 * 2**i, 0.2 + 0.05 * i)) for i in range(7)]


@pytest.mark.parametrize("form", ["power", "power_limit", "shifted_limit", "chinchilla"])
def test_an_error_that_rises_with_compute_is_refused(form):
    with pytest.raises(UserError) as raised:
        make_report(rising(), FitConfig(source="runs.csv", form=form, resamples=100))
    assert str(raised.value).startswith("no law fits 'runs.csv': the error rises with compute (rank correlation +1.00")
    assert "is it an accuracy?" in str(raised.value)


def test_noise_around_a_level_is_no_rising_error():
    errors = (0.30, 0.31, 0.29, 0.30, 0.32, 0.30)
    runs = [Run(str(i), Point(1.0, 1e6 * 2**i, error)) for i, error in enumerate(errors)]
    assert make_report(runs, FitConfig(source="runs.csv", form="power", resamples=100)).law is not None


def test_no_run_that_can_be_used_is_refused_with_the_reasons():
    runs = [make_run("a", {"gmacs": 1, "samples": 1e6, "error": 50}), make_run("b", {"gmacs": 1, "samples": 1e6})]
    with pytest.raises(UserError) as raised:
        make_report(runs, FitConfig(source="runs.csv"))
    assert str(raised.value) == (
        "none of the 2 runs of 'runs.csv' can be used: a: error 50 is above 1: it must be a share, not percent; "
        "b: error is missing"
    )
