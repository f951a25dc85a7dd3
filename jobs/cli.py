"""What every job's command line has in common: CONFIG key=value ... --json PATH, --help, one-line errors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rayclip.config import Config
from rayclip.config_file import describe, load
from rayclip.errors import UserError


def run_job(
    main: Callable[[Any], dict[str, Any]], schema: type[Config], summary_path: Callable[[Any], Path]
) -> NoReturn:
    """Parse the command line, run the job, write its summary, and exit: 0, or 2 with one line for a user's error."""
    try:
        sys.exit(_run(sys.argv[1:], main, schema, summary_path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _run(
    arguments: list[str],
    main: Callable[[Any], dict[str, Any]],
    schema: type[Config],
    summary_path: Callable[[Any], Path],
) -> int:
    job = Path(sys.argv[0]).stem
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"usage: python -m jobs.{job} CONFIG.yaml [key=value ...] [--json PATH]\n\n{describe(schema)}")
        return 0 if arguments else 2
    arguments, json_path = _take_option(arguments, "--json")
    config = load(schema, arguments[0], arguments[1:])
    summary = main(config)
    path = Path(json_path) if json_path else summary_path(config)
    write_json(path, summary)
    return 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole and then named."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


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
