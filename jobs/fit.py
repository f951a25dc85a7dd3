"""`rayclip fit` where a cluster runs scripts: python -m jobs.fit"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.fit import command

if __name__ == "__main__":
    run_and_exit(command)
