"""The error that people cause and can mend."""

import importlib.util
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import NoReturn


class UserError(ValueError):
    """Bad input: one clear line that says what was wrong, where, and what is allowed.

    Jobs print the line and exit with code 2; every other exception is a defect and keeps its traceback.
    """


class CrashedError(UserError):
    """Workers died more often than `cluster.max_failures` allows; another try may go better."""


class Interruption(KeyboardInterrupt):
    """A signal has ended the work; the message, if any, says what has been saved and how to go on."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.number, str(self))

    @property
    def exit_code(self) -> int:
        """What a shell gives for a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


def raise_interruption(number: int, frame: object) -> NoReturn:
    """Signal handler: raise Interruption where the process is."""
    raise Interruption(number)


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code: 2 and one line for a user's error, 130 for ctrl-c, 143 for SIGTERM."""
    signal.signal(signal.SIGTERM, raise_interruption)
    try:
        sys.exit(command())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        if str(error):
            print(f"\n{error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, Interruption) else 130)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says anything, or the error's kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require_extra(module: str, extra: str, what: str) -> None:
    """Raise UserError that says how to install a module which only some of the package needs, where it is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{what} needs {module}, which is not installed: pip install 'rayclip[{extra}]'")


def nearest(name: str, allowed: list[str]) -> str:
    """A hint for a name that is not allowed: the nearest that is, or the whole list."""
    any_case = {other.lower(): other for other in allowed}
    close = get_close_matches(name.lower(), any_case, n=1, cutoff=0.5)
    return f"did you mean '{any_case[close[0]]}'?" if close else f"allowed: {', '.join(sorted(allowed))}"
