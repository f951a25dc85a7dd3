"""`python -m serve`, the same as `rayclip serve`."""

from rayclip.cli.command import run_and_exit
from rayclip.cli.serve import command

if __name__ == "__main__":
    run_and_exit(command)
