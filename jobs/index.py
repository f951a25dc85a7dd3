"""Write the manifest of tar shards that exist already: python -m jobs.index FOLDER"""

from pathlib import Path
from typing import Any

from jobs.cli import run_job
from rayclip.config import IndexConfig
from rayclip.orchestration.ingest import index_folder


def main(config: IndexConfig) -> dict[str, Any]:
    """Read every shard's headers and write `manifest.parquet`; returns what was found."""
    summary = index_folder(config)
    print(f"{'samples':>11}  {'shards':>7}  {'chunks':>9}  {'MB':>9}  folder")
    print(
        f"{summary['samples']:>11,}  {summary['shards']:>7,}  {summary['chunks']:>9,}  "
        f"{summary['bytes'] / 1e6:>9,.1f}  {summary['path']}"
    )
    return summary


if __name__ == "__main__":
    run_job(main, IndexConfig, lambda config: Path(config.path) / "index.json", ("path",))
