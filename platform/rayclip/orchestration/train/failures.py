"""Failures of workers: which of them another start would meet again."""

import re

import torch.distributed
from ray.exceptions import RayError, RayTaskError

_MOST_LETTERS = 500
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_OF_PEERS = ("gloo", "nccl")
"""What messages name that say that another worker, or the way to it, is lost."""


def describe_failure(error: BaseException) -> str | None:
    """Return an error in a line, the same for the same error; None for one that may have passed at the next start.

    Those are errors of files, of networks, of the tracking server, and of processes that were lost.
    """
    if isinstance(error, RayTaskError):
        error = error.cause
    message = " ".join(str(error).split())
    lost = isinstance(error, OSError | RayError | torch.distributed.DistError)
    if lost or type(error).__module__.startswith("mlflow.") or any(word in message.lower() for word in _OF_PEERS):
        return None
    return f"{type(error).__name__}: {_ADDRESS.sub('0x', message)[:_MOST_LETTERS]}"
