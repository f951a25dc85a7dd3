"""`rayclip embed` where a cluster runs scripts: python -m jobs.embed"""

from rayclip.cli.command import run_and_exit
from rayclip.cli.embed import command

if __name__ == "__main__":
    run_and_exit(command)
