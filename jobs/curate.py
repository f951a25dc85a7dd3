"""`rayclip curate` where a cluster runs scripts: python -m jobs.curate"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.curate import command

if __name__ == "__main__":
    run_and_exit(command)
