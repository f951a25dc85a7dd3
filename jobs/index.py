"""`rayclip index` where a cluster runs scripts: python -m jobs.index"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.index import command

if __name__ == "__main__":
    run_and_exit(command)
