"""Label a data set's pictures zero-shot, to Parquet: python -m jobs.classify CONFIG key=value ..."""

from typing import Any, NoReturn

from rayclip.cli.command import print_table, run_job
from rayclip.config import ClassifyConfig
from rayclip.io.storage import format_path, join
from rayclip.orchestration.batch.classify import classify
from rayclip.orchestration.batch.partitioned_output import format_causes

_SHOWN_LABELS = 5


def main(config: ClassifyConfig) -> dict[str, Any]:
    """Label the pictures, or what an interrupted run left of them; returns the summary. Raises UserError."""
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


def command() -> NoReturn:
    """Run the command that `sys.argv` gives, and exit."""
    run_job(main, ClassifyConfig, lambda config: join(config.output, "summary.json"))
