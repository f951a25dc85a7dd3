"""Embed a data set's pictures and captions to Parquet: python -m jobs.embed CONFIG key=value ..."""

from rayclip.cli.embed import command

if __name__ == "__main__":
    command()
