"""`rayclip compare` where a cluster runs scripts: python -m jobs.compare"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.compare import command

if __name__ == "__main__":
    run_and_exit(command)
