"""Measure a model with a suite of data sets: zero-shot, linear probe, retrieval, robustness."""

from typing import Any

from rayclip.cli.command import Command, print_table
from rayclip.config import SuiteConfig
from rayclip.io.storage import format_path


def main(config: SuiteConfig) -> dict[str, Any]:
    """Measure, or what an interrupted run left of it; returns the summary. Raises UserError."""
    from rayclip.orchestration.batch.evaluate import evaluate

    summary = evaluate(config)
    print()
    print_table(
        [
            ("model", summary["model_version"]),
            *[(name, _format_result(result)) for name, result in summary["datasets"].items()],
            *[(name, f"not there: {why}") for name, why in summary["not_there"].items()],
            ("features", _format_extraction(summary["extraction"])),
            ("report", format_path(summary["output"])),
        ]
    )
    return summary


def _format_result(result: dict[str, Any]) -> str:
    score = result["score"]
    interval = "" if score["low"] is None else f" [{score['low']:.1%}, {score['high']:.1%}]"
    among = f", {result['num_classes']:,} classes" if result["num_classes"] else ""
    notes = "".join(f"; {note}" for note in result["notes"])
    return f"{result['metric']} {score['value']:.1%}{interval}, {result['num_samples']:,} pictures{among}{notes}"


def _format_extraction(done: dict[str, Any]) -> str:
    rate = f", {done['samples_per_s']:,.0f}/s once started" if done["samples_per_s"] else ""
    return f"{done['new_samples']:,} of {done['samples']:,} new, the others were there{rate}"


def _summary_path(config: SuiteConfig) -> str:
    from rayclip.orchestration.batch.evaluate import output_folder
    from rayclip.tracking.registry import resolve_model

    version = resolve_model(config.model, config.tracking_uri).version
    return str(output_folder(config, version) / "summary.json")


def _check(config: SuiteConfig) -> None:
    """Raise the UserError of a data set, a metric or a baseline that the run would refuse."""
    from rayclip.evaluation.shift import read_baselines
    from rayclip.evaluation.suite import open_suite

    open_suite(config)
    read_baselines(config.baselines)


command = Command("rayclip evaluate", SuiteConfig, main, _summary_path, ("model",), from_file=True, check=_check)
