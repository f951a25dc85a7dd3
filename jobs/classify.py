"""Label a data set's pictures zero-shot, to Parquet: python -m jobs.classify CONFIG key=value ..."""

from rayclip.cli.classify import command

if __name__ == "__main__":
    command()
