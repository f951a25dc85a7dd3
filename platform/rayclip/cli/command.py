"""A command line over one settings class: CONFIG key=value ... --json PATH, --check, --help, one-line errors."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from rayclip.config import Config
from rayclip.config.fields import describe_replaced
from rayclip.config.loader import describe, load
from rayclip.errors import Interruption, UserError, exit_with
from rayclip.io.s3 import StorageError
from rayclip.io.storage import find_file, join, read_bytes, write_bytes
from rayclip.orchestration.cluster.progress import note, progress_shown


class Settings(NamedTuple):
    """What a command line asks for: the checked settings, and where the summary will be written."""

    config: Config
    summary: str


def _in_output(config: Any) -> str:
    return join(config.output, "summary.json")


def _nothing_more(config: Config) -> None:
    pass


@dataclass(frozen=True)
class Command:
    """A job as a command: called with its arguments, it runs the job, writes the summary and returns the exit code.

    The settings start from a YAML file or a recipe's name, or, where `positional` names keys, from their values;
    `from_file`: from both. A name that ends with "..." takes any number of values. `main` and `summary_path` import
    what is heavy when they are called: a mistake in the settings must be answered before that.
    """

    prog: str
    schema: type[Config]
    main: Callable[[Any], dict[str, Any]]
    summary_path: Callable[[Any], str] = _in_output
    positional: tuple[str, ...] = ()
    from_file: bool = False
    rewrites: bool = False
    """Whether the output is made anew each time, over what is there."""
    check: Callable[[Any], None] = _nothing_more
    """Raises the UserError of what `main` would refuse beside the settings themselves; --check calls it."""

    def __call__(self, arguments: list[str]) -> int:
        """Run the job; returns 0. Raises UserError, and Interruption where a signal ends it."""
        if not arguments or "--help" in arguments or "-h" in arguments:
            print_help(self.help())
            return 0 if arguments else 2
        check, quiet = "--check" in arguments, "--quiet" in arguments
        arguments = [argument for argument in arguments if argument not in ("--check", "--quiet")]
        try:
            config, summary = self.parse(arguments)
            if "--json" in arguments and find_file(summary) and _read_summary(summary) is None:
                raise UserError(f"--json '{summary}' is there and is no summary, which could be written over")
            if check:
                self.check(config)
                found = {"kind": self.schema.__name__, "summary": summary, "config": config.model_dump(mode="json")}
                print(json.dumps(found))
                return 0
            with progress_shown(not quiet), self._output(config, summary) as settings:
                done = self.main(config) | settings
                write_bytes(summary, (json.dumps(done, indent=2) + "\n").encode())
        except StorageError as error:
            raise UserError(str(error)) from None
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interruption) else signal.SIGINT
            raise Interruption(
                number, str(error) or "interrupted; the same command goes on from where it was"
            ) from None
        return 0

    @contextmanager
    def _output(self, config: Config, summary: str) -> Iterator[dict[str, Any]]:
        """Hold the folder of an output that is written over what is there, which is said where it is of other settings.

        Gives what the summary is to say of the settings. An output that is gone on with is held where it is written.
        """
        if not self.rewrites:
            yield {}
            return
        from rayclip.io.lease import hold
        from rayclip.io.paths import storage_path

        settings, folder = {"settings": config.model_dump(mode="json")}, storage_path(summary).parent
        with hold(folder, f"the output in '{folder}'", say=note):
            replaced = describe_replaced(_read_summary(summary), settings)
            if replaced:
                note(f"what was in '{folder}' is replaced: {replaced}")
            yield settings

    def help(self) -> str:
        """Return the usage and every key with its default and meaning."""
        usage = " ".join([self.prog, *(name.upper() for name in self._required)])
        return f"usage: {usage} [key=value ...] [--json PATH] [--check] [--quiet]\n\n{describe(self.schema)}"

    def parse(self, arguments: list[str]) -> Settings:
        """Return the settings that the arguments give, of which an option may be --json PATH. Raises UserError."""
        arguments, json_path = take_option(arguments, "--json")
        required = self._required
        if required[0].endswith("..."):
            arguments = _gather(arguments)
        if len(arguments) < len(required):
            missing = " and ".join(name.upper() for name in required[len(arguments) :])
            raise UserError(f"give {missing}; --help shows every key")
        given, overrides = arguments[: len(required)], arguments[len(required) :]
        named = [f"{key.removesuffix('...')}={value}" for key, value in zip(self.positional, given, strict=False)]
        config = load(self.schema, given[-1] if self._takes_file else None, named + overrides)
        return Settings(config, json_path or self.summary_path(config))

    @property
    def config_index(self) -> int | None:
        """Which of the arguments is the YAML file or the recipe's name; None where the command takes none."""
        return len(self.positional) if self._takes_file else None

    @property
    def _takes_file(self) -> bool:
        return self.from_file or not self.positional

    @property
    def _required(self) -> tuple[str, ...]:
        return (*self.positional, *["config"] * self._takes_file)


def run_and_exit(command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command with this process's arguments and exit with its code: 2 and one line for a user's error."""
    exit_with(lambda: command(sys.argv[1:]))


def print_help(text: str) -> None:
    """Print a help text; whoever reads only its head, as `| head` does, gets no traceback after it."""
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(text)


def print_table(rows: list[tuple[str, str]]) -> None:
    """Print two aligned columns, indented."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _read_summary(path: str) -> dict[str, Any] | None:
    """What a command wrote there; None where that is nothing, or something else."""
    try:
        found = json.loads(read_bytes(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def take_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """Return the arguments without an option, and its value or None. Raises UserError where the value is missing."""
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
