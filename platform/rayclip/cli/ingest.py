"""Turn images and captions into a data set in shards; after a crash it goes on."""

from typing import Any

from rayclip.cli.command import Command
from rayclip.config import IngestConfig


def main(config: IngestConfig) -> dict[str, Any]:
    """Write the data set, or what an interrupted run left of it; returns what it holds."""
    from rayclip.orchestration.batch.ingest import ingest

    summary = ingest(config)
    print(f"{summary['output']} {'was complete already' if summary['complete'] else 'is complete'}")
    print(f"{'split':<20}  {'samples':>11}  {'classes':>7}  {'shards':>7}  {'MB':>9}  skipped")
    for name, split in summary["splits"].items():
        skipped = ", ".join(f"{count:,} {cause}" for cause, count in split["skipped"].items())
        print(
            f"{name:<20}  {split['samples']:>11,}  {split['classes'] or '-':>7}  {split['shards']:>7,}  "
            f"{split['bytes'] / 1e6:>9,.1f}  {skipped or '-'}"
        )
    return summary


command = Command("rayclip ingest", IngestConfig, main)
