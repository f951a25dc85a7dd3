"""Curate a data set by CLIP's recipe, queries, balance and duplicates, into a new one: python -m jobs.curate CONFIG"""

from typing import Any, NoReturn

from rayclip.cli.command import print_table, run_job
from rayclip.config import CurateConfig
from rayclip.io.storage import format_path, join
from rayclip.orchestration.batch.curate import curate


def main(config: CurateConfig) -> dict[str, Any]:
    """Write the new data set, or what an interrupted run left of it; returns the summary. Raises UserError."""
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


def command() -> NoReturn:
    """Run the command that `sys.argv` gives, and exit."""
    run_job(main, CurateConfig, lambda config: join(config.output, "summary.json"))
