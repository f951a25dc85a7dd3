"""Build the embedded data set, train a small CLIP on it, evaluate and register it: five minutes on two cores."""

from rayclip.cli import ingest, train
from rayclip.cli.command import print_help
from rayclip.config import TrainConfig
from rayclip.config.loader import load

_USAGE = """usage: rayclip demo [key=value ...]

  rayclip ingest ingest_glyphs and then rayclip train demo, in this folder: data/glyphs, runs/demo and mlflow are
  written here. key=value changes the training; rayclip train --help shows every key."""


def command(arguments: list[str]) -> int:
    """Ingest, then train; the exit code of the first that fails. Raises UserError."""
    if {"-h", "--help"} & set(arguments):
        print_help(_USAGE)
        return 0
    load(TrainConfig, "demo", arguments)  # a mistake is answered before the data set is made
    if failed := ingest.command(["ingest_glyphs"]):
        return failed

    from rayclip.orchestration.cluster.connection import disconnect

    disconnect()  # each job starts a Ray that has the cores it needs
    return train.command(["demo", *arguments])
