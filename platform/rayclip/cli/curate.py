"""Select a better data set from pairs by CLIP's recipe: query matches, balance and duplicates."""

from typing import Any

from rayclip.cli.command import Command, print_table
from rayclip.config import CurateConfig
from rayclip.errors import require_extra
from rayclip.io.storage import format_path, join


def main(config: CurateConfig) -> dict[str, Any]:
    """Write the new data set, or what an interrupted run left of it; returns the summary. Raises UserError."""
    require_extra("ahocorasick", "curate", "curate")
    from rayclip.orchestration.batch.curate import curate

    summary = curate(config)
    print()
    print_table([(outcome, f"{count:,}") for outcome, count in summary["outcomes"].items()])
    most = summary["most_pairs_of_a_query"]
    print_table(
        [
            ("queries", f"{summary['queries']:,}, of which {summary['queries_found']:,} find a pair"),
            ("most pairs of a query", f"{most['before']:,} before, {most['after']:,} after"),
            ("pairs a query", format_path(join(summary["output"], "queries.png"))),
            ("data set", f"{format_path(summary['output'])}, {summary['kept']:,} of {summary['samples']:,} pairs"),
        ]
    )
    return summary


command = Command("rayclip curate", CurateConfig, main)
