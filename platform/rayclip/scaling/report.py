"""What a fit says: for programs, and on a card for people."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from rayclip.config import FitConfig
from rayclip.errors import UserError
from rayclip.scaling.fit import (
    Estimate,
    Law,
    NotEnoughError,
    RisingError,
    fit_law,
    fitted_runs,
    flags,
    selection_bias,
    why_no_limit,
)
from rayclip.scaling.holdout import Holdout, hold_out
from rayclip.scaling.points import Point, Run

UNITS = "C = forward GMACs a pair times samples seen; training costs three times as much"
_SHOWN_DROPPED = 20
_SHOWN_REASONS = 3

Card = list[tuple[str, str]]


@dataclass(frozen=True)
class FitReport:
    """A fit with all that belongs to it; `law` is None, and `reason` says why, where the runs do not carry one."""

    config: FitConfig
    runs: list[Run]
    law: Law | None
    reason: str
    holdouts: list[Holdout]

    @property
    def usable(self) -> list[Run]:
        """The runs that have figures, in the order that laws and hold-outs count them."""
        return [run for run in self.runs if run.point is not None]


def make_report(runs: list[Run], config: FitConfig) -> FitReport:
    """Fit the runs, hold some out, and say of every run that is not fitted why.

    Raises UserError where no run can be used, and where the error rises with compute.
    """
    points = [run.point for run in runs if run.point is not None]
    if not points:
        reasons = "; ".join(f"{run.name}: {run.reason}" for run in runs[:_SHOWN_REASONS])
        raise UserError(f"none of the {len(runs)} runs of '{config.source}' can be used: {reasons or 'there are none'}")
    holdouts = hold_out(points, config)
    try:
        law = fit_law(points, config)
    except RisingError as reason:
        raise UserError(f"no law fits '{config.source}': {reason}") from None
    except NotEnoughError as reason:
        return FitReport(config, runs, None, str(reason), holdouts)
    return FitReport(config, _with_reasons(runs, points, law, config), law, "", holdouts)


def summarise(report: FitReport) -> dict[str, Any]:
    """Return the whole report as plain values, for summary.json."""
    config, law = report.config, report.law
    estimates = _estimates(report)
    names = [run.name for run in report.usable]
    # Those that have no figures first: they are what somebody may want to mend.
    dropped = sorted((run for run in report.runs if run.reason), key=lambda run: run.point is not None)
    return {
        "source": config.source,
        "form": config.form,
        "frontier": config.frontier,
        "bins": config.bins,
        "units": UNITS,
        "num_runs": len(report.runs),
        "num_fitted": law.num_fitted if law else 0,
        "repeats": _repeats(report.usable),
        **{name: asdict(estimate) for name, estimate in estimates.items()},
        "flags": [*flags(law), *_describe_selection(law, config)] if law else [report.reason],
        "holdout": [holdout.as_dict(names) for holdout in report.holdouts],
        "plan": _plan(report),
        "resamples": config.resamples,
        "seed": config.seed,
        "dropped": [{"name": run.name, "reason": run.reason} for run in dropped],
    }


def card(summary: dict[str, Any]) -> Card:
    """Return the table rows that `rayclip fit` prints."""
    rows = [
        ("runs", f"{summary['num_fitted']} fitted of {summary['num_runs']}, frontier {summary['frontier']}"),
        ("form", f"{summary['form']}; {UNITS}"),
    ]
    if summary["repeats"]:
        rows.append(("repeated data", _describe_repeats(summary["repeats"])))
    rows += [
        (key, _format_estimate(value)) for key, value in summary.items() if isinstance(value, dict) and "value" in value
    ]
    rows += [("flag", flag) for flag in summary["flags"]]
    rows += [(f"fitted below {held['fitted_below']}", _describe_holdout(held)) for held in summary["holdout"]]
    plan = summary["plan"] or {}
    rows += [(f"at C = {plan['compute']:.3g}", f"{name} {_format_estimate(plan[name])}")
             for name in ("error", "gmacs", "samples") if plan]  # fmt: skip
    if plan.get("times_the_largest_run"):
        rows.append((f"at C = {plan['compute']:.3g}", f"{plan['times_the_largest_run']:.3g} times the largest run"))
    dropped = summary["dropped"]
    rows += [("dropped", f"{entry['name']}: {entry['reason']}") for entry in dropped[:_SHOWN_DROPPED]]
    if len(dropped) > _SHOWN_DROPPED:
        rows.append(("dropped", f"and {len(dropped) - _SHOWN_DROPPED} more, in the CSV"))
    return rows


def _estimates(report: FitReport) -> dict[str, Estimate]:
    if report.law is None:
        return {name: Estimate(None, reason=report.reason) for name in ("coefficient", "exponent", "limit")}
    estimates = report.law.estimates()
    reason = why_no_limit(report.law)
    return estimates | ({"limit": Estimate(None, reason=reason)} if reason else {})


def _describe_selection(law: Law, config: FitConfig) -> list[str]:
    """What it does to intervals that runs were picked for their small errors."""
    if config.frontier == "all":
        return []
    bias = selection_bias(law)
    if bias is None:
        return ["narrow: more than noise parts the frontier from the other runs; its intervals are of resampled runs"]
    return [
        f"selected: by noise alone the frontier's errors are {bias:.1%} too small; intervals are set right for that"
    ]


def _repeats(runs: list[Run]) -> dict[str, Any] | None:
    """How many runs saw samples more than once, and how often the most; None where the source says of none."""
    epochs = [run.point.samples / run.unique_samples for run in runs if run.point and run.unique_samples]
    if not epochs:
        return None
    repeated = [times for times in epochs if times > 1]
    return {"runs": len(repeated), "told": len(epochs), "least": min(repeated, default=1), "most": max(epochs)}


def _plan(report: FitReport) -> dict[str, Any] | None:
    """What the law says of the budget: the error, and the model and samples that reach it."""
    budget, law = report.config.budget, report.law
    if budget is None:
        return None
    none = Estimate(None, reason=report.reason or f"form {report.config.form} has no model sizes: take chinchilla")
    gmacs, samples = (law.best_model(budget) if law else None) or (none, none)
    error = law.best_error(budget) if law else none
    largest = max((run.point.compute for run in report.usable if run.point), default=None)
    factor = budget / largest if largest else None
    text = {"error": asdict(error), "gmacs": asdict(gmacs), "samples": asdict(samples)}
    return {"compute": budget, "times_the_largest_run": factor, **text}


def _with_reasons(runs: list[Run], points: list[Point], law: Law, config: FitConfig) -> list[Run]:
    fitted, found, index = fitted_runs(law), [], 0
    names = [run.name for run in runs if run.point is not None]
    for run in runs:
        if run.point is None:
            found.append(run)
            continue
        found.append(run if index in fitted else replace(run, reason=_why_not(index, names, points, config)))
        index += 1
    return found


def _why_not(index: int, names: list[str], points: list[Point], config: FitConfig) -> str:
    if config.frontier == "bins":
        return "another run of its bin has less error"
    point = points[index]
    cheaper = [i for i, other in enumerate(points) if i != index and _no_more(other.compute, point.compute)]
    better = [i for i in cheaper if _no_more(points[i].error, point.error)]
    best = min(better, key=lambda i: (points[i].error, points[i].compute))
    return f"not on the frontier: '{names[best]}' has no more error for no more compute"


def _no_more(value: float, than: float) -> bool:
    return value <= than * (1 + 1e-9)


def _format_estimate(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return f"- ({estimate['reason']})"
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g}  [{estimate['low']:.4g}, {estimate['high']:.4g}]"


def _describe_repeats(repeats: dict[str, Any]) -> str:
    text = f"{repeats['runs']} of the {repeats['told']} runs that say it saw their samples more than once"
    if not repeats["runs"]:
        return text
    return f"{text}, {repeats['least']:.3g} to {repeats['most']:.3g} times; C counts each time as if it were new"


def _describe_holdout(held: dict[str, Any]) -> str:
    if held["error"] is None:
        return f"- ({held['reason']})"
    nearer = "nearer than" if held["nearer_than_baseline"] else "no nearer than"
    farthest = held["runs"][-1]
    return (
        f"{len(held['runs'])} runs foretold to {held['error']:.4f}, "
        f"{nearer} a straight line's {held['baseline_error']:.4f}; "
        f"the largest, {farthest['factor']:.3g} times what was fitted: {farthest['predicted']:.4f}, "
        f"measured {farthest['measured']:.4f}"
    )
