"""Curate a data set by CLIP's recipe, queries, balance and duplicates, into a new one: python -m jobs.curate CONFIG"""

from typing import Any

from jobs.cli import print_table, run_job
from rayclip.config import CurateConfig
from rayclip.orchestration.curate import curate
from rayclip.storage import join, told


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
            ("pairs a query", told(join(summary["output"], "queries.png"))),
            ("data set", f"{told(summary['output'])}, {summary['kept']:,} of {summary['samples']:,} pairs"),
        ]
    )
    return summary


if __name__ == "__main__":
    run_job(main, CurateConfig, lambda config: join(config.output, "summary.json"))
