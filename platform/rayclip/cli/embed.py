"""Embed a data set's pictures and captions to Parquet: python -m jobs.embed CONFIG key=value ..."""

from typing import Any, NoReturn

from rayclip.cli.command import print_table, run_job
from rayclip.config import EmbedConfig
from rayclip.io.storage import format_path, join
from rayclip.orchestration.batch.embed import embed
from rayclip.orchestration.batch.partitioned_output import format_causes


def main(config: EmbedConfig) -> dict[str, Any]:
    """Embed the data set, or what an interrupted run left of it; returns the summary. Raises UserError."""
    summary = embed(config)
    print()
    print_table(
        [
            ("model", summary["model_version"]),
            ("samples", f"{summary['samples']:,} in {summary['parts']:,} parts"),
            ("embedded", f"{summary['pictures']:,} pictures, {summary['texts']:,} texts"),
            ("with an error", format_causes(summary) or "none"),
            ("time", f"{summary['time_s']:.0f} s, {summary['samples_per_s']:,.0f} samples/s once started"),
            ("embeddings", format_path(summary["output"])),
        ]
    )
    return summary


def command() -> NoReturn:
    """Run the command that `sys.argv` gives, and exit."""
    run_job(main, EmbedConfig, lambda config: join(config.output, "summary.json"))
