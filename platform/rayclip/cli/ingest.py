"""Turn pictures and captions into a data set: python -m jobs.ingest CONFIG key=value ..."""

from typing import Any, NoReturn

from rayclip.cli.command import run_job
from rayclip.config import IngestConfig
from rayclip.io.storage import join
from rayclip.orchestration.batch.ingest import ingest


def main(config: IngestConfig) -> dict[str, Any]:
    """Write the data set, or what an interrupted run left of it; returns what it holds."""
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


def command() -> NoReturn:
    """Run the command that `sys.argv` gives, and exit."""
    run_job(main, IngestConfig, lambda config: join(config.output, "summary.json"))
