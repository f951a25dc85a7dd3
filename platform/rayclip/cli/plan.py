"""Plan a training: model size, samples, days, loader cores and cost."""

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rayclip.cli.command import Command, print_table
from rayclip.config import PlanConfig
from rayclip.errors import UserError
from rayclip.io.paths import storage_path

if TYPE_CHECKING:
    from rayclip.scaling.fit import Estimate
    from rayclip.scaling.plan import TrainingPlan


def main(config: PlanConfig) -> dict[str, Any]:
    """Answer the question; returns the summary. Raises UserError for one that cannot be answered."""
    from rayclip.scaling.plan import make_plan, measured_flops, read_law

    fitted = read_law(storage_path(config.law)) if config.law is not None else None
    plan = make_plan(config, fitted, measured_flops(config, _samples_per_s(config)))
    summary = summarise(config, plan)
    print_table(card(summary))
    return summary


def summarise(config: PlanConfig, plan: "TrainingPlan") -> dict[str, Any]:
    """Return the plan as plain values; an interval's end that is infinite is None."""
    from rayclip.scaling.plan import batch_size, checkpoint_bytes

    samples, hours = plan.samples.value or 0.0, plan.gpu_hours
    speed, price = plan.samples_per_s, config.price_per_gpu_hour
    cores = config.loader_samples_per_core_s
    return {
        "model": plan.model,
        "nearest_preset": plan.nearest,
        "gmacs": plan.gmacs,
        "samples": _plain(plan.samples),
        "epochs": samples / config.unique_samples if config.unique_samples else None,
        "batch_size": batch_size(config, samples),
        "compute": _plain(plan.compute),
        "error": _plain(plan.error) if plan.error else None,
        "num_gpus": config.num_gpus,
        "flops_per_gpu_s": plan.flops_per_gpu_s,
        "gpu_hours": _plain(hours),
        "days": _plain(hours, 1 / 24 / config.num_gpus),
        "cost": _plain(hours, price) if price else None,
        "samples_per_s": speed,
        "loader_cores": math.ceil(speed / cores) if cores else None,
        "read_mb_per_s": speed * config.bytes_per_pair / 1e6 if config.bytes_per_pair else None,
        "checkpoint_bytes": checkpoint_bytes(plan.nearest),
        "times_the_largest_run": plan.times_the_largest_run,
        "notes": plan.notes,
    }


def card(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows that `rayclip plan` prints: what was planned, and which key would tell what is missing."""
    missing = {
        "loader_cores": "loader_samples_per_core_s",
        "read_mb_per_s": "bytes_per_pair",
        "cost": "price_per_gpu_hour",
        "epochs": "unique_samples",
        "error": "law",
        "model": "model, or train one of these gmacs",
    }
    rows = [(key, _format_value(value, missing.get(key))) for key, value in summary.items()
            if key not in ("notes", "times_the_largest_run")]  # fmt: skip
    return rows + [("note", note) for note in summary["notes"]]


def _samples_per_s(config: PlanConfig) -> float | None:
    if config.run is None:
        return config.samples_per_s
    try:
        return float(json.loads(storage_path(config.run).read_text())["samples_per_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{config.run}' is no summary of rayclip train: {' '.join(str(error).split())}") from None


def _plain(estimate: "Estimate", factor: float = 1.0) -> dict[str, Any]:
    plain = {key: value for key, value in asdict(estimate).items() if key != "reason"}
    return {key: value * factor if value is not None and math.isfinite(value) else None for key, value in plain.items()}


def _format_value(value: Any, missing: str | None) -> str:
    if value is None:
        return f"- (give {missing})" if missing else "-"
    if isinstance(value, dict):
        ends = "  [{}, {}]".format(*(_number(value[end]) for end in ("low", "high")))
        return _number(value["value"]) + ("" if value["low"] is None else ends)
    return value if isinstance(value, str) else _number(value)


def _number(value: float | None) -> str:
    return "no end" if value is None else f"{value:,.4g}" if value < 1e6 else f"{value:.4g}"


command = Command("rayclip plan", PlanConfig, main, lambda config: "runs/plans/summary.json", rewrites=True)
