"""What every job's command line has in common: CONFIG key=value ... --json PATH, --help, one-line errors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rayclip.config import Config
from rayclip.config_file import describe, load
from rayclip.errors import UserError
from rayclip.storage import write_bytes

Main = Callable[[Any], dict[str, Any]]


def run_job(
    main: Main, schema: type[Config], summary_path: Callable[[Any], Path | str], positional: tuple[str, ...] = ()
) -> NoReturn:
    """Parse the command line, run the job, write its summary, and exit: 0, or 2 with one line for a user's error.

    A job starts from a YAML file, or, where `positional` names keys, from their values.
    """
    try:
        sys.exit(_run(sys.argv[1:], main, schema, summary_path, positional))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from where it was", file=sys.stderr)
        sys.exit(130)


def _run(
    arguments: list[str],
    main: Main,
    schema: type[Config],
    summary_path: Callable[[Any], Path | str],
    positional: tuple[str, ...],
) -> int:
    wanted = positional or ("config.yaml",)
    if not arguments or "--help" in arguments or "-h" in arguments:
        usage = " ".join([f"python -m jobs.{Path(sys.argv[0]).stem}", *(name.upper() for name in wanted)])
        print(f"usage: {usage} [key=value ...] [--json PATH]\n\n{describe(schema)}")
        return 0 if arguments else 2
    arguments, json_path = _take_option(arguments, "--json")
    if len(arguments) < len(wanted):
        raise UserError(
            f"give {' and '.join(name.upper() for name in wanted[len(arguments) :])}; --help shows every key"
        )
    given, overrides = arguments[: len(wanted)], arguments[len(wanted) :]
    if positional:
        overrides = [f"{key}={value}" for key, value in zip(positional, given, strict=True)] + overrides
    config = load(schema, None if positional else given[0], overrides)
    summary = main(config)
    write_bytes(json_path or str(summary_path(config)), (json.dumps(summary, indent=2) + "\n").encode())
    return 0


def print_table(rows: list[tuple[str, str]]) -> None:
    """Two columns for people."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _take_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    if name not in arguments:
        return arguments, None
    at = arguments.index(name)
    if at + 1 == len(arguments):
        raise UserError(f"{name} needs a value")
    return arguments[:at] + arguments[at + 2 :], arguments[at + 1]
