"""Write the manifest of shards, tables or pictures that exist already: python -m jobs.index URI"""

from rayclip.cli.index import command

if __name__ == "__main__":
    command()
