"""Reports of evaluated models, read back, and held against each other.

Two models that answered the same pictures are compared picture by picture: what both get right or wrong says nothing of
their difference, so the interval of paired differences is the narrower one.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rayclip.config.evaluation import RENAMED_METRICS
from rayclip.errors import UserError
from rayclip.evaluation.scoring import mean_difference
from rayclip.io.paths import StoragePath, matching, storage_path, to_read

ANSWERS = "answers.parquet"
RANKS = "ranks.parquet"
SUMMARY = "summary.json"
_PAIRED = ("top1", "mean_top1_top5", "mean_per_class")
"""Metrics that are means over pictures."""


class _Pairs(NamedTuple):
    """Of the same pictures: their classes, and how many classes each model put before the true one."""

    label_N: Tensor
    base_N: Tensor
    other_N: Tensor


@dataclass(frozen=True)
class EvaluationReport:
    """What rayclip evaluate wrote of one model."""

    folder: StoragePath
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        """The model's version, which is what people tell models apart by."""
        return str(self.summary["model_version"])

    @property
    def datasets(self) -> dict[str, Any]:
        """Results by data set."""
        found: dict[str, Any] = self.summary["datasets"]
        return found


def find_reports(paths: Sequence[str], pass_over: Callable[[str], None] | None = None) -> list[EvaluationReport]:
    """The reports that lie at the paths or in folders below them.

    `pass_over` is told each path without any. Raises UserError for one where it is None, and where there is no report.
    """
    found = []
    for path in paths:
        folder = storage_path(path)
        there = [folder / SUMMARY, *matching(folder, f"*/{SUMMARY}"), *matching(folder, f"*/*/{SUMMARY}")]
        reports = [report for file in there if file.is_file() and (report := _read(file)) is not None]
        if not reports and pass_over is not None:
            pass_over(path)
        if not reports and (pass_over is None or len(paths) == 1):
            raise UserError(f"no report of rayclip evaluate in '{path}': give folders with its summary.json")
        found += reports
    if not found:
        raise UserError(
            f"no report of rayclip evaluate in any of {len(paths)} paths: give folders with its summary.json"
        )
    return found


def compare(reports: Sequence[EvaluationReport]) -> dict[str, Any]:
    """Scores of every model on every data set, and its difference from the first model's. Plain values.

    A data set that a model was not measured on, or on which another metric was taken, has None there.
    """
    names = list(dict.fromkeys(name for report in reports for name in report.datasets))
    return {
        "models": [report.name for report in reports],
        "datasets": {name: _compare_on(name, reports) for name in names},
    }


def _read(file: StoragePath) -> EvaluationReport | None:
    try:
        summary = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or not isinstance(summary.get("datasets"), dict) or "model_version" not in summary:
        return None
    for result in summary["datasets"].values():
        if "metric" in result:
            result["metric"] = RENAMED_METRICS.get(result["metric"], result["metric"])
    return EvaluationReport(file.parent, summary)


def _compare_on(name: str, reports: Sequence[EvaluationReport]) -> dict[str, Any]:
    first = next(report.datasets[name] for report in reports if name in report.datasets)
    there = [report.datasets.get(name) for report in reports]
    scores = [result["score"] if result and result["metric"] == first["metric"] else None for result in there]
    differences = [
        None if score is None or scores[0] is None else _difference(name, reports[0], report)
        for score, report in zip(scores, reports, strict=True)
    ]
    return {"title": first["title"], "metric": first["metric"], "scores": scores, "difference": differences}


def _difference(name: str, base: EvaluationReport, other: EvaluationReport) -> dict[str, Any]:
    """Score of `other` less that of `base`, with its 95% interval where there is one."""
    ours, theirs = (report.datasets[name] for report in (other, base))
    value = ours["score"]["value"] - theirs["score"]["value"]
    if ours["metric"] in _PAIRED and (pairs := _pairs(name, base, other)) is not None:
        worth = [_worth(rank_N, pairs.label_N, ours["metric"]) for rank_N in (pairs.other_N, pairs.base_N)]
        return {**mean_difference(worth[0] - worth[1])._asdict(), "paired": True}
    if (
        ".recall_at_" in ours["metric"]
        and (per_image := _recall_difference(name, base, other, ours["metric"])) is not None
    ):
        return {**mean_difference(per_image)._asdict(), "paired": True}
    halves = [half for result in (ours, theirs) if (half := _half_width(result["score"])) is not None]
    if len(halves) < 2:
        return {"value": value, "low": None, "high": None, "paired": False}
    half = math.hypot(*halves)
    return {"value": value, "low": value - half, "high": value + half, "paired": False}


def _pairs(name: str, base: EvaluationReport, other: EvaluationReport) -> _Pairs | None:
    """Both models' answers to the same pictures, in one order; None where the pictures differ."""
    files = [report.folder / name / ANSWERS for report in (base, other)]
    if not all(file.is_file() for file in files):
        return None
    tables = [pq.read_table(to_read(file), columns=["id", "label", "rank"]).sort_by("id") for file in files]
    if any(not tables[0][column].equals(tables[1][column]) for column in ("id", "label")):
        return None
    columns = [tables[0]["label"], *(table["rank"] for table in tables)]
    return _Pairs(*(torch.tensor(column.to_numpy(), dtype=torch.int64) for column in columns))


def _recall_difference(name: str, base: EvaluationReport, other: EvaluationReport, metric: str) -> Tensor | None:
    """What each image adds to the difference of recalls, so that the mean of all is it; None where the images differ.

    Captions of one image are one draw, as they are right or wrong together more often than others.
    """
    files = [report.folder / name / RANKS for report in (base, other)]
    if not all(file.is_file() for file in files):
        return None
    way, _, k = metric.partition(".recall_at_")
    of_way = [pq.read_table(to_read(file), filters=[("way", "=", way)]) for file in files]
    right = [
        table.group_by("id").aggregate([("rank", "count"), ("right", "sum")]).sort_by("id")
        for table in (
            table.append_column("right", pc.cast(pc.less(table["rank"], int(k)), pa.int64())) for table in of_way
        )
    ]
    if any(not right[0][column].equals(right[1][column]) for column in ("id", "rank_count")):
        return None
    gained_N, count_N = (
        torch.tensor(column.to_numpy()).double()
        for column in (pc.subtract(right[1]["right_sum"], right[0]["right_sum"]), right[0]["rank_count"])
    )
    return gained_N / count_N.mean()


def _worth(rank_N: Tensor, label_N: Tensor, metric: str) -> Tensor:
    """What each picture adds, so that the mean of all is the metric."""
    top1_N = (rank_N < 1).double()
    if metric == "mean_top1_top5":
        return (top1_N + (rank_N < 5).double()) / 2
    if metric == "mean_per_class":
        counts_C = torch.bincount(label_N)
        return top1_N * len(label_N) / int((counts_C > 0).sum()) / counts_C[label_N]
    return top1_N


def _half_width(score: dict[str, float | None]) -> float | None:
    low, high = score["low"], score["high"]
    return None if low is None or high is None else (high - low) / 2
