"""Train a CLIP, evaluate it, register the best checkpoint; the same command goes on with a run that was interrupted."""

from rayclip.cli.train import command

if __name__ == "__main__":
    command()
