"""What every job's command line has in common: CONFIG key=value ... --json PATH, --check, --help, one-line errors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rayclip.config import Config
from rayclip.config.loader import describe, load
from rayclip.errors import UserError, exit_with
from rayclip.io.s3 import StorageError
from rayclip.io.storage import write_bytes

Main = Callable[[Any], dict[str, Any]]


def run_job(
    main: Main,
    schema: type[Config],
    summary_path: Callable[[Any], Path | str],
    positional: tuple[str, ...] = (),
    from_file: bool = False,
) -> NoReturn:
    """Parse the command line, run the job, write its summary, and exit: 0, or 2 with one line for a user's error.

    A job starts from a YAML file, or, where `positional` names keys, from their values; `from_file`: from both. A name
    that ends with "..." takes any number of values.
    """
    exit_with(
        lambda: _run(sys.argv[1:], main, schema, summary_path, positional, from_file or not positional),
        interrupted="interrupted; the same command goes on from where it was",
    )


def _run(
    arguments: list[str],
    main: Main,
    schema: type[Config],
    summary_path: Callable[[Any], Path | str],
    positional: tuple[str, ...],
    from_file: bool,
) -> int:
    wanted = (*positional, *["config.yaml"] * from_file)
    if not arguments or "--help" in arguments or "-h" in arguments:
        usage = " ".join([f"python -m jobs.{Path(sys.argv[0]).stem}", *(name.upper() for name in wanted)])
        print(f"usage: {usage} [key=value ...] [--json PATH] [--check]\n\n{describe(schema)}")
        return 0 if arguments else 2
    arguments, json_path = take_option(arguments, "--json")
    check, arguments = "--check" in arguments, [argument for argument in arguments if argument != "--check"]
    if wanted[0].endswith("..."):
        arguments = _gather(arguments)
    if len(arguments) < len(wanted):
        raise UserError(
            f"give {' and '.join(name.upper() for name in wanted[len(arguments) :])}; --help shows every key"
        )
    given, overrides = arguments[: len(wanted)], arguments[len(wanted) :]
    overrides = [
        f"{key.removesuffix('...')}={value}" for key, value in zip(positional, given, strict=False)
    ] + overrides
    config = load(schema, given[-1] if from_file else None, overrides)
    path = json_path or str(summary_path(config))
    if check:  # the settings alone; what a submitted job will be is read here
        print(json.dumps({"kind": schema.__name__, "summary": path, "config": config.model_dump(mode="json")}))
        return 0
    try:
        write_bytes(path, (json.dumps(main(config), indent=2) + "\n").encode())
    except StorageError as error:
        raise UserError(str(error)) from None
    return 0


def print_table(rows: list[tuple[str, str]]) -> None:
    """Two columns for people."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def take_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """The arguments without an option, and its value where it is given. Raises UserError where that is missing."""
    if name not in arguments:
        return arguments, None
    at = arguments.index(name)
    if at + 1 == len(arguments):
        raise UserError(f"{name} needs a value")
    return arguments[:at] + arguments[at + 2 :], arguments[at + 1]


def _gather(arguments: list[str]) -> list[str]:
    """Those that are no key=value as one, a list in YAML; then the others."""
    values = [argument for argument in arguments if "=" not in argument]
    return [str(values)] * bool(values) + [argument for argument in arguments if "=" in argument]
