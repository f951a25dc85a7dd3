"""`rayclip evaluate` where a cluster runs scripts: python -m jobs.evaluate"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.evaluate import command

if __name__ == "__main__":
    run_and_exit(command)
