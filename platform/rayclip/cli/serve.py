"""Serve a model over HTTP, with a page to try it; also `rollback` and `key`, see --help."""

import sys

from rayclip.cli.command import print_help
from rayclip.config.loader import describe, load
from rayclip.errors import UserError
from rayclip.serve import launch
from rayclip.serve.config import ServeConfig

_USAGE = """usage: rayclip serve [CONFIG] model=MODEL [key=value ...]     serve a model
       rayclip serve rollback models:/NAME@ALIAS [to=VERSION]    move the alias back; a running service follows
       rayclip serve key NAME                                    make an API key and the line for auth.keys_file
"""


def command(arguments: list[str]) -> int:
    """Run a command; the exit code. Raises UserError."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print_help(f"{_USAGE}\n{describe(ServeConfig)}")
        return 0 if arguments else 2
    first, rest = arguments[0], arguments[1:]
    if first == "key":
        return _key(rest)
    if first == "rollback":
        return _rollback(rest)
    return _serve(arguments)


def _serve(arguments: list[str]) -> int:
    path = arguments[0] if "=" not in arguments[0] else None
    config = load(ServeConfig, path, arguments[1:] if path else arguments)
    version = launch.check(config)
    launch.set_environment()
    return launch.run(config, version)


def _rollback(arguments: list[str]) -> int:
    from rayclip.tracking.registry import roll_back

    if not arguments:
        raise UserError("give the alias to move back: rayclip serve rollback models:/NAME@ALIAS [to=VERSION]")
    options = dict(argument.partition("=")[::2] for argument in arguments[1:])
    unknown = set(options) - {"to", "tracking_uri"}
    if unknown or not options.get("to", "1").isdigit():
        raise UserError(f"'{arguments[-1]}' is neither to=VERSION nor tracking_uri=URI")
    to = int(options["to"]) if "to" in options else None
    before, after = roll_back(arguments[0], to, options.get("tracking_uri"))
    print(f"{arguments[0]}: version {before} -> {after}")
    return 0


def _key(arguments: list[str]) -> int:
    from rayclip.serve.middleware.auth import new_key

    if len(arguments) != 1:
        raise UserError("give the key's name: rayclip serve key NAME")
    key, line = new_key(arguments[0])
    print(f"the key, shown only now: {key}", file=sys.stderr)
    print(line)
    return 0
