"""The `rayclip` command: `rayclip COMMAND ...` runs `rayclip.cli.COMMAND`, which imports what it needs when it runs."""

import importlib
from collections.abc import Callable

from rayclip import __version__
from rayclip.cli.command import run_and_exit
from rayclip.errors import UserError, nearest

JOBS = (
    "ingest",
    "index",
    "curate",
    "train",
    "sweep",
    "evaluate",
    "compare",
    "embed",
    "classify",
    "fit",
    "plan",
    "convert",
)
"""Commands that a cluster can run too: each is `main(config)` with a settings class."""
COMMANDS = ("demo", *JOBS, "serve", "submit", "ui")


def get_command(name: str) -> Callable[[list[str]], int]:
    """Return the command that takes arguments and returns the exit code. Raises UserError that names the nearest."""
    if name not in COMMANDS:
        raise UserError(f"no command '{name}': {nearest(name, list(COMMANDS))}")
    command: Callable[[list[str]], int] = importlib.import_module(f"rayclip.cli.{name}").command
    return command


def describe_command(name: str) -> str:
    """Return the one line that says what a command does: the first of its module's docstring."""
    return (importlib.import_module(f"rayclip.cli.{name}").__doc__ or "").splitlines()[0]


def run(arguments: list[str]) -> int:
    """Run a command; the exit code. Raises UserError."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "--version":
        print(f"rayclip {__version__}")
        return 0
    if name in ("", "-h", "--help"):
        print("usage: rayclip COMMAND ...    (rayclip COMMAND --help shows what it takes)\n")
        for command in COMMANDS:
            print(f"  {command:<9} {describe_command(command)}")
        return 0 if arguments else 2
    return get_command(name)(rest)


def main() -> None:
    """Run the command that `sys.argv` names, and exit."""
    run_and_exit(run)
