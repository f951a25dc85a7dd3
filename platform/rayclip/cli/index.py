"""Write the manifest of shards, tables or folders of images that exist already."""

from typing import Any

from rayclip.cli.command import Command
from rayclip.config import IndexConfig
from rayclip.io.storage import join


def main(config: IndexConfig) -> dict[str, Any]:
    """Read the shards that are new or have changed and write `manifest.parquet`; returns what there is."""
    from rayclip.data.index import describe_findings
    from rayclip.orchestration.batch.index import index

    summary = index(config)
    print(f"{'samples':>11}  {'shards':>7}  {'chunks':>9}  {'MB':>9}  folder")
    print(
        f"{summary['samples']:>11,}  {summary['shards']:>7,}  {summary['chunks']:>9,}  "
        f"{summary['bytes'] / 1e6:>9,.1f}  {summary['path']}"
    )
    print(f"{summary['read']:,} of the shards were read, the others are as the last index found them")
    for line in describe_findings(summary):
        print(f"  {line}")
    return summary


def _summary_path(config: IndexConfig) -> str:
    from rayclip.data.index_plan import output_folder

    return join(output_folder(config), "index.json")


command = Command("rayclip index", IndexConfig, main, _summary_path, ("path",))
