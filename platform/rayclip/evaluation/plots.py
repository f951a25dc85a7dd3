"""Scores as pictures: bars with intervals for any number of models, and a radar where there are enough data sets."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logit

from rayclip.evaluation.robustness import BaselineLine
from rayclip.io.figures import png_figure
from rayclip.io.paths import StoragePath

_COLOURS = ("#0969da", "#bf8700", "#1a7f37", "#cf222e", "#8250df", "#57606a", "#bf3989")
_LEAST_AXES = 3  # of a radar


Point = tuple[float, float]
"""Accuracy without shift, and under it."""


def write_bars(path: StoragePath, comparison: dict[str, Any]) -> None:
    """A group of bars a data set, a bar a model, with 95% intervals."""
    models, datasets = comparison["models"], comparison["datasets"]
    height = 0.8 / len(models)

    with png_figure(path, 9, 1.2 + len(datasets) * max(0.4, 0.25 * len(models)), font_size=9, dpi=110) as figure:
        axes = figure.add_subplot()
        for number, model in enumerate(models):
            scores = [of_one["scores"][number] for of_one in datasets.values()]
            there = [(row, value) for row, value in enumerate(scores) if value is not None]
            rows = np.array([row for row, _ in there], dtype=float) + height * (number - (len(models) - 1) / 2)
            axes.barh(rows, [score["value"] for _, score in there], height, label=model, color=_colour(number))
            for row, (_, score) in zip(rows, there, strict=True):
                if score["low"] is not None:
                    axes.plot([score["low"], score["high"]], [row, row], color="#1f2328", linewidth=1)
        names = [f"{of_one['title']}, {of_one['metric']}" for of_one in datasets.values()]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.grid(True, axis="x", linewidth=0.3)
        axes.legend(fontsize=8, loc="lower right")


def write_radar(path: StoragePath, comparison: dict[str, Any]) -> bool:
    """An axis a data set, a line a model; False, and nothing written, for fewer than three that all models have."""
    models = comparison["models"]
    datasets = [d for d in comparison["datasets"].values() if all(d["scores"])]
    if len(datasets) < _LEAST_AXES:
        return False
    angles = np.linspace(0, 2 * np.pi, len(datasets), endpoint=False)

    with png_figure(path, 7, 7, font_size=9, dpi=110) as figure:
        axes = figure.add_subplot(projection="polar")
        for number, model in enumerate(models):
            values = [d["scores"][number]["value"] for d in datasets]
            closed = np.append(angles, angles[0]), np.append(values, values[0])
            axes.plot(*closed, color=_colour(number), label=model)
            axes.fill(*closed, color=_colour(number), alpha=0.08)
        axes.set_xticks(angles, [d["title"] for d in datasets], fontsize=8)
        axes.set_ylim(0, 1)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.2))
    return True


def write_corruptions(
    path: StoragePath, clean: float, by_strength: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Accuracy over the strength of each corruption, with 95% intervals; strength 0 is without any."""
    with png_figure(path, 6.5, 4.5, font_size=9, dpi=110) as figure:
        axes = figure.add_subplot()
        for number, (name, found) in enumerate(by_strength.items()):
            values = [clean, *(one["value"] for one in found)]
            axes.plot(range(len(values)), values, "o-", color=_colour(number), label=name.replace("_", " "))
            for strength, one in enumerate(found, 1):
                axes.plot([strength, strength], [one["low"], one["high"]], color=_colour(number), linewidth=1)
        axes.set(xlabel="strength", ylabel="accuracy", ylim=(0, 1))
        axes.grid(True, linewidth=0.3)
        axes.legend(fontsize=8)


def write_robustness(
    path: StoragePath, others: Sequence[Point], line: BaselineLine | None, own: Point, name: str
) -> None:
    """Accuracy under shift over accuracy without, both as logits: other models, their line, and the model."""
    with png_figure(path, 6, 5, font_size=9, dpi=110) as figure:
        axes = figure.add_subplot()
        for point, colour, label in [(p, _COLOURS[5], None) for p in others] + [(own, _COLOURS[0], name)]:
            axes.plot(*point, "o", color=colour, label=label)
        ends = np.array([np.clip(value, 0.001, 0.999) for point in (*others, own) for value in point])
        reach = expit(np.linspace(logit(ends.min()) - 0.3, logit(ends.max()) + 0.3, 50))
        axes.plot(reach, reach, ":", color=_COLOURS[5], linewidth=1, label="no loss")
        if line is not None:
            shifted = [line.shifted(float(x)) for x in reach]
            axes.plot(reach, shifted, "-", color=_COLOURS[1], label=f"line of {len(others)} other models")
        axes.set(xscale="logit", yscale="logit", xlabel="accuracy without shift", ylabel="accuracy under shift")
        axes.grid(True, linewidth=0.3)
        axes.legend(fontsize=8)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
