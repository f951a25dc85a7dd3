"""Curate a data set by CLIP's recipe, queries, balance and duplicates, into a new one: python -m jobs.curate CONFIG"""

from rayclip.cli.curate import command

if __name__ == "__main__":
    command()
