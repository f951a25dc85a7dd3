"""The memory that a piece of work takes, measured in a process of its own."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from rayclip.errors import UserError


def extra_bytes(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """The peak while `prepare(*arguments)`'s result is called, beyond what was held before the call.

    On a GPU that is what torch has allocated there, else what is resident. A fresh process is started for it: the peak
    of one that has measured something is that of the largest. Raises UserError where it dies, as of too much.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, torch.get_num_threads(), prepare, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise UserError("memory could not be measured: its process has died, maybe of too much") from None
    finally:
        process.join()


def _measure(pipe: Connection, threads: int, prepare: Callable[..., Callable[[], object]], arguments: Any) -> None:
    torch.set_num_threads(threads)
    work = prepare(*arguments)
    before = _held_bytes()
    work()
    pipe.send(_peak_bytes() - before)


def _held_bytes() -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage: what a process inherits of its parent's peak lives on in there.
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
