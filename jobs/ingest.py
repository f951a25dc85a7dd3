"""Turn pictures and captions into a data set: python -m jobs.ingest CONFIG key=value ..."""

from rayclip.cli.ingest import command

if __name__ == "__main__":
    command()
