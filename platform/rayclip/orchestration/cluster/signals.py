"""SIGINT and SIGTERM while work is under way that is to be saved before the process ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rayclip.errors import raise_interruption


class Received:
    """The first signal that came; `number` is None before it."""

    number: int | None = None


@contextmanager
def deferred_signals() -> Iterator[Received]:
    """Note the first SIGINT or SIGTERM that comes in the block, for it to act on; the second raises Interruption.

    Outside a process's main thread, where signals never arrive, nothing is noted.
    """
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        received.number = number
        for each in before:
            signal.signal(each, raise_interruption)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
