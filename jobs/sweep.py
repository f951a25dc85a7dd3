"""`rayclip sweep` where a cluster runs scripts: python -m jobs.sweep"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.sweep import command

if __name__ == "__main__":
    run_and_exit(command)
