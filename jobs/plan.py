"""`rayclip plan` where a cluster runs scripts: python -m jobs.plan"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.plan import command

if __name__ == "__main__":
    run_and_exit(command)
