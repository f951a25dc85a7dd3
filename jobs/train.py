"""`rayclip train` where a cluster runs scripts: python -m jobs.train"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.train import command

if __name__ == "__main__":
    run_and_exit(command)
