"""Train a ladder of models for a scaling law, or search for the best settings; after a crash it goes on."""

from rayclip.cli.sweep import command

if __name__ == "__main__":
    command()
