"""`rayclip classify` where a cluster runs scripts: python -m jobs.classify"""

from rayclip.cli.classify import command
from rayclip.cli.command import run_and_exit

if __name__ == "__main__":
    run_and_exit(command)
