"""Fit a scaling law to runs, from a CSV or an MLflow experiment, with intervals."""

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rayclip.cli.command import Command, print_table
from rayclip.config import FitConfig
from rayclip.errors import UserError
from rayclip.io.paths import StoragePath, storage_path
from rayclip.io.storage import find_file, format_path

if TYPE_CHECKING:
    from rayclip.scaling.points import Run


def main(config: FitConfig) -> dict[str, Any]:
    """Fit the law, draw it, and log it; returns the summary. Raises UserError for a source that cannot be read."""
    from rayclip.scaling.plot import write_plot
    from rayclip.scaling.points import write_csv
    from rayclip.scaling.report import card, make_report, summarise

    report = make_report(_read(config), config)
    summary = summarise(report)
    folder = output_folder(config)
    table, image = folder / "points.csv", folder / "law.png"
    write_csv(table, report.runs)
    write_plot(image, report)
    _log(config, summary, [table, image])
    print_table([*card(summary), ("written", f"{format_path(str(folder))}: law.png, points.csv, summary.json")])
    return summary


def output_folder(config: FitConfig) -> StoragePath:
    """Where the fit is written."""
    name = PurePath(config.source).stem if _is_table(config) else config.source
    return storage_path(config.output or f"runs/fits/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}")


def _is_table(config: FitConfig) -> bool:
    return config.source.lower().endswith(".csv") or find_file(config.source) is not None


def _read(config: FitConfig) -> "list[Run]":
    from rayclip.scaling.experiment import read_experiment
    from rayclip.scaling.points import read_csv

    if _is_table(config):
        if config.metric is not None:
            raise UserError("metric is for an MLflow experiment; a CSV has its column error")
        return read_csv(storage_path(config.source), config.dataset)
    if config.dataset is not None:
        raise UserError("dataset is for a CSV that has that column; an experiment has metric")
    return read_experiment(config.tracking_uri, config.source, config.metric)


def _log(config: FitConfig, summary: dict[str, Any], files: list[StoragePath]) -> None:
    experiment = config.log_to or (None if _is_table(config) else config.source)
    if experiment is None:
        return

    from rayclip.tracking.experiment import log_result

    figures = {key: value["value"] for key, value in summary.items() if isinstance(value, dict) and "value" in value}
    metrics = {f"fit/{key}": value for key, value in figures.items() if value is not None}
    log_result(
        config.tracking_uri, experiment, "fit", f"fit {config.form}", config.model_dump(mode="json"), metrics, files
    )


command = Command(
    "rayclip fit",
    FitConfig,
    main,
    lambda config: str(output_folder(config) / "summary.json"),
    ("source",),
    rewrites=True,
)
