"""Write the features of a data set's images and captions to Parquet; after a crash it goes on."""

from typing import Any

from rayclip.cli.command import Command, print_table
from rayclip.config import EmbedConfig
from rayclip.io.storage import format_path


def main(config: EmbedConfig) -> dict[str, Any]:
    """Embed the data set, or what an interrupted run left of it; returns the summary. Raises UserError."""
    from rayclip.orchestration.batch.embed import embed
    from rayclip.orchestration.batch.partitioned_output import format_causes

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


def _check(config: EmbedConfig) -> None:
    from rayclip.orchestration.batch.embed import plan_embedding

    plan_embedding(config)[0].output.check()


command = Command("rayclip embed", EmbedConfig, main, check=_check)
