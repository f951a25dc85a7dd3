"""Label a data set's images with zero-shot classification, to Parquet; after a crash it goes on."""

from typing import Any

from rayclip.cli.command import Command, print_table
from rayclip.config import ClassifyConfig
from rayclip.io.storage import format_path

_SHOWN_LABELS = 5


def main(config: ClassifyConfig) -> dict[str, Any]:
    """Label the pictures, or what an interrupted run left of them; returns the summary. Raises UserError."""
    from rayclip.orchestration.batch.classify import classify
    from rayclip.orchestration.batch.partitioned_output import format_causes

    summary = classify(config)
    often = list(summary["labels"].items())[:_SHOWN_LABELS]
    print()
    print_table(
        [
            ("model", summary["model_version"]),
            ("samples", f"{summary['samples']:,} in {summary['parts']:,} parts"),
            ("with an error", format_causes(summary) or "none"),
            ("most frequent", ", ".join(f"{label} {count:,}" for label, count in often) or "-"),
            ("time", f"{summary['time_s']:.0f} s, {summary['samples_per_s']:,.0f} samples/s once started"),
            ("labels", format_path(summary["output"])),
        ]
    )
    return summary


def _check(config: ClassifyConfig) -> None:
    from rayclip.orchestration.batch.classify import plan_labelling

    plan_labelling(config)[0].output.check()


command = Command("rayclip classify", ClassifyConfig, main, check=_check)
