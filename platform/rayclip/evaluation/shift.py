"""What a shift of the data costs a model, and how much of it other models of its accuracy are spared: a data set beside
the one that it is a shift of, against the line of other models' results.

Accuracies are fractions of 1.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rayclip.errors import UserError
from rayclip.evaluation.plots import Point, write_robustness
from rayclip.evaluation.reports import find_reports
from rayclip.evaluation.robustness import BaselineLine, effective_robustness, fit_baseline
from rayclip.io.paths import StoragePath, storage_path

Accuracies = Mapping[str, Mapping[str, float]]
"""Of other models by name, on data sets by name."""

_LEAST_MODELS = 3


def read_baselines(paths: Sequence[str]) -> dict[str, dict[str, float]]:
    """Other models' accuracies, from reports of rayclip evaluate, folders of them, and CSVs (column `model`, a column a
    data set; empty where a model was not measured).

    Raises UserError for a path that is neither, a CSV without a model column, a value that is no fraction of 1.
    """
    found: dict[str, dict[str, float]] = {}
    for path in paths:
        of_path = _read_csv(storage_path(path)) if path.endswith(".csv") else _read_reports(path)
        for model, accuracies in of_path:
            found.setdefault(model, {}).update(accuracies)
    return found


def _read_reports(path: str) -> list[tuple[str, dict[str, float]]]:
    return [
        (report.name, {name: top1["value"] for name, result in report.datasets.items() if (top1 := _top1(result))})
        for report in find_reports([path])
    ]


def _read_csv(path: StoragePath) -> list[tuple[str, dict[str, float]]]:
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except OSError:
        raise UserError(f"no file '{path}' of other models' accuracies") from None
    if not rows or "model" not in rows[0]:
        raise UserError(f"'{path}' needs a column 'model', and a column a data set, with a row a model")
    return [(row["model"], _accuracies(row, f"'{path}', line {line}")) for line, row in enumerate(rows, 2)]


def _accuracies(row: Mapping[str, str], where: str) -> dict[str, float]:
    given = {name: text for name, text in row.items() if name != "model" and text}
    try:
        values = {name: float(text) for name, text in given.items()}
    except (TypeError, ValueError):
        raise UserError(f"{where}: accuracies must be numbers, got {', '.join(map(str, given.values()))}") from None
    outside = [name for name, value in values.items() if not 0 < value < 1]
    if outside:
        raise UserError(f"{where}: accuracy of '{outside[0]}' must lie inside 0..1, got {given[outside[0]]}")
    return values


def has_accuracy(results: Mapping[str, Any], name: str) -> bool:
    """Whether a data set was measured, and its zero-shot accuracy was."""
    return name in results and _top1(results[name]) is not None


def shift_report(
    name: str, of: str, results: Mapping[str, Any], model: str, baselines: Accuracies, image: StoragePath
) -> dict[str, Any]:
    """The cost of the shift from data set `of` to data set `name`, with its interval (the data sets' pictures are drawn
    apart), and the effective robustness where other models give a line. Both must have an accuracy. Plain values; draws
    the picture.
    """
    plain, shifted = (_top1(results[other]) for other in (of, name))
    assert plain is not None and shifted is not None
    half = math.hypot(*((one["high"] - one["low"]) / 2 for one in (plain, shifted)))
    cost = shifted["value"] - plain["value"]
    others = [(a[of], a[name]) for other, a in baselines.items() if other != model and {of, name} <= a.keys()]
    line = fit_baseline(*zip(*others, strict=True)) if len(others) >= _LEAST_MODELS else None
    own: Point = (plain["value"], shifted["value"])
    write_robustness(image, others, line, own, model)
    return {
        "of": of,
        "accuracy": plain,
        "shifted": shifted,
        "change": {"value": cost, "low": cost - half, "high": cost + half},
        "num_models": len(others),
        **(_effective(line, own, results[of]["num_samples"], results[name]["num_samples"]) if line else {}),
    }


def _effective(line: BaselineLine, own: Point, num: int, num_shifted: int) -> dict[str, Any]:
    counts = round(own[0] * num), num, round(own[1] * num_shifted), num_shifted
    found = effective_robustness(line, *counts)
    return {
        "slope": line.slope,
        "intercept": line.intercept,
        "expected": found.expected,
        "effective_robustness": {"value": found.value, "low": found.low, "high": found.high},
    }


def _top1(result: Mapping[str, Any]) -> Mapping[str, float] | None:
    found: Mapping[str, float] | None = result.get("zero_shot", {}).get("figures", {}).get("top1")
    return found
