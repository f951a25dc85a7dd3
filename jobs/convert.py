"""`rayclip convert` where a cluster runs scripts: python -m jobs.convert"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.convert import command

if __name__ == "__main__":
    run_and_exit(command)
