"""Measure a model with a suite of data sets: python -m jobs.evaluate MODEL CONFIG key=value ..."""

from rayclip.cli.evaluate import command

if __name__ == "__main__":
    command()
