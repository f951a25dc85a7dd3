"""Compare evaluated models: a table with intervals, a plot, a page."""

import sys
from typing import Any

from rayclip.cli.command import Command, print_table
from rayclip.config import CompareConfig
from rayclip.io.paths import StoragePath, storage_path
from rayclip.io.storage import format_path


def main(config: CompareConfig) -> dict[str, Any]:
    """Compare, draw and log; returns the comparison. Raises UserError for a path without a report."""
    from rayclip.evaluation.page import write_comparison
    from rayclip.evaluation.plots import write_bars, write_radar
    from rayclip.evaluation.reports import compare, find_reports

    passed_over: list[str] = []
    comparison = {**compare(find_reports(config.runs, passed_over.append)), "passed_over": passed_over}
    for path in passed_over:
        print(f"note: '{path}' is passed over: it holds no report of rayclip evaluate", file=sys.stderr)
    folder = storage_path(config.output)
    images = [folder / "scores.png"]
    write_bars(images[0], comparison)
    if write_radar(folder / "radar.png", comparison):
        images.append(folder / "radar.png")
    page = folder / "comparison.html"
    write_comparison(page, comparison, images)
    _print(comparison)
    print_table([("written", f"{format_path(str(page))}, summary.json")])
    _log(config, comparison, [page, *images])
    return comparison


def _print(comparison: dict[str, Any]) -> None:
    from rayclip.evaluation.page import difference, score

    rows = [("model", comparison["models"][0])]
    for name, of_one in comparison["datasets"].items():
        rows.append((name, f"{of_one['metric']} {score(of_one['scores'][0]).text}"))
    for number, model in enumerate(comparison["models"][1:], 1):
        rows.append(("model", f"{model}, less {comparison['models'][0]}, in points"))
        for name, of_one in comparison["datasets"].items():
            cell = f"{score(of_one['scores'][number]).text}  {difference(of_one['difference'][number]).text}"
            rows.append((name, cell))
    print_table(rows)


def _log(config: CompareConfig, comparison: dict[str, Any], files: list[StoragePath]) -> None:
    if config.experiment is None:
        return

    from rayclip.tracking.experiment import log_result

    metrics = {
        f"compare/{name}/{model.replace('@', '-')}": found["value"]
        for name, of_one in comparison["datasets"].items()
        for model, found in zip(comparison["models"], of_one["scores"], strict=True)
        if found is not None
    }
    settings = config.model_dump(mode="json")
    log_result(config.tracking_uri, config.experiment, "comparison", "comparison", settings, metrics, files)


command = Command("rayclip compare", CompareConfig, main, positional=("runs...",), rewrites=True)
