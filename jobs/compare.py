"""Hold evaluated models against each other: python -m jobs.compare REPORT [REPORT ...] key=value ..."""

from rayclip.cli.compare import command

if __name__ == "__main__":
    command()
