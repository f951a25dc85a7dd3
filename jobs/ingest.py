"""`rayclip ingest` where a cluster runs scripts: python -m jobs.ingest"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.ingest import command

if __name__ == "__main__":
    run_and_exit(command)
