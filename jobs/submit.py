"""`rayclip submit` where a cluster runs scripts: python -m jobs.submit"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.submit import command

if __name__ == "__main__":
    run_and_exit(command)
