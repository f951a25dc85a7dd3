"""Label a data set's pictures zero-shot, to Parquet: python -m jobs.classify CONFIG key=value ..."""

from typing import Any

from jobs.cli import print_table, run_job
from rayclip.config import ClassifyConfig
from rayclip.orchestration.classify import classify
from rayclip.orchestration.parts import told_causes
from rayclip.storage import join, told

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
            ("with an error", told_causes(summary) or "none"),
            ("most frequent", ", ".join(f"{label} {count:,}" for label, count in often) or "-"),
            ("time", f"{summary['time_s']:.0f} s, {summary['samples_per_s']:,.0f} samples/s once started"),
            ("labels", told(summary["output"])),
        ]
    )
    return summary


if __name__ == "__main__":
    run_job(main, ClassifyConfig, lambda config: join(config.output, "summary.json"))
