"""A law in a picture: runs, frontier, the law with its band, what was foretold, and published laws beside it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from rayclip.io.figures import png_figure
from rayclip.io.paths import StoragePath
from rayclip.scaling.fit import Estimate, Law
from rayclip.scaling.report import FitReport

PUBLISHED = {"Cherti et al., open data": (5.858, -0.111), "Cherti et al., WIT": (23.18, -0.164)}
"""Coefficient and exponent of ImageNet's zero-shot top-1 error over C in GMACs."""

_INK, _FAINT, _LAW = "#1f2328", "#8c959f", "#0969da"
_HELD_OUT = ("#1a7f37", "#bf8700", "#cf222e")
_NUM_PLACES = 100
_AHEAD = 10  # times the largest run that the law is drawn to


def write_plot(path: StoragePath, report: FitReport) -> None:
    """Write a PNG; the same report gives the same bytes."""
    with png_figure(path, 9, 6) as figure:
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="C, forward GMACs a pair times samples seen", ylabel="error")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # none over many decades
        axes.grid(True, which="both", linewidth=0.3, color=_FAINT)
        _draw(axes, report)


def _draw(axes: Axes, report: FitReport) -> None:
    usable = report.usable
    for fitted, label, face in ((True, "fitted runs", _INK), (False, "other runs", "none")):
        points = [run.point for run in usable if run.point and (not run.reason) is fitted]
        axes.plot([p.compute for p in points], [p.error for p in points], "o", markersize=5, color=_INK,
                  markerfacecolor=face, alpha=1 if fitted else 0.5, label=label)  # fmt: skip
    if usable:
        computes = np.array([run.point.compute for run in usable if run.point])
        least, most = float(computes.min()), float(max(computes.max() * _AHEAD, report.config.budget or 0))
        places = np.geomspace(least, most, _NUM_PLACES)
        if report.law is not None:
            _draw_law(axes, report.law, places)
        for (name, (coefficient, exponent)), dashes in zip(PUBLISHED.items(), ("--", ":"), strict=True):
            curve = coefficient * places**exponent
            if (curve > 1).all():
                continue
            axes.plot(places[curve <= 1], curve[curve <= 1], dashes, color=_FAINT,
                      label=f"{name}, {coefficient:g} C^{exponent:g}")  # fmt: skip
    for held, colour in zip(report.holdouts, _HELD_OUT, strict=False):
        if held.runs:
            axes.plot([run.compute for run in held.runs], [run.predicted for run in held.runs], "x", color=colour,
                      label=f"foretold from below the largest / {held.divisor}")  # fmt: skip
    axes.set_title(f"{report.config.form}: {report.reason}" if report.reason else report.config.form)
    axes.legend(fontsize=8, loc="lower left")


def _draw_law(axes: Axes, law: Law, places: np.ndarray) -> None:
    if law.form.name != "chinchilla":  # whose runs are not at the best model and samples for their compute
        kept = law.runs.weight[0] > 0
        axes.plot(np.exp(law.runs.compute[0][kept]), np.exp(law.runs.error[0][kept]), "s", markersize=9,
                  color=_LAW, markerfacecolor="none", label="frontier")  # fmt: skip
    value, low, high = np.array([_interval(law.best_error(float(place))) for place in places]).T
    axes.plot(places, value, color=_LAW, label="law")
    axes.fill_between(places, low, high, color=_LAW, alpha=0.15, linewidth=0, label="95% interval")


def _interval(estimate: Estimate) -> tuple[float, float, float]:
    value, low, high = (float("nan") if x is None else x for x in (estimate.value, estimate.low, estimate.high))
    return value, low, high
