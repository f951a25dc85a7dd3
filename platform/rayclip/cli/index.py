"""Write the manifest of shards, tables or pictures that exist already: python -m jobs.index URI"""

from typing import Any, NoReturn

from rayclip.cli.command import run_job
from rayclip.config import IndexConfig
from rayclip.data.index import output_folder
from rayclip.io.storage import join
from rayclip.orchestration.batch.index import index


def main(config: IndexConfig) -> dict[str, Any]:
    """Read the shards that are new or have changed and write `manifest.parquet`; returns what there is."""
    summary = index(config)
    print(f"{'samples':>11}  {'shards':>7}  {'chunks':>9}  {'MB':>9}  folder")
    print(
        f"{summary['samples']:>11,}  {summary['shards']:>7,}  {summary['chunks']:>9,}  "
        f"{summary['bytes'] / 1e6:>9,.1f}  {summary['path']}"
    )
    print(f"{summary['read']:,} of the shards were read, the others are as the last index found them")
    for problem in summary["problems"]:
        print(f"  {problem}")
    return summary


def command() -> NoReturn:
    """Run the command that `sys.argv` gives, and exit."""
    run_job(main, IndexConfig, lambda config: join(output_folder(config), "index.json"), ("path",))
