"""Fit a scaling law to runs: python -m jobs.fit SOURCE form=power key=value ..."""

from rayclip.cli.fit import command

if __name__ == "__main__":
    command()
