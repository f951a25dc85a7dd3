"""What workers tell each other beside gradients. Without a process group, what went in comes out.

These are collectives: every worker calls them, in the same order.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from rayclip.errors import UserError


def rank() -> int:
    """This process among those that work together."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _is_distributed() else 1


def gather_counts(counts: list[int], device: torch.device) -> list[list[int]]:
    """Every worker's counts, by rank; all have equally many."""
    if not _is_distributed():
        return [counts]
    mine = torch.tensor(counts, dtype=torch.int64, device=_collective_device(device))
    return [part.tolist() for part in _all_gather(mine)]


def reduce_counts(counts: Tensor) -> Tensor:
    """The element-wise sum over all workers, without gradients: same shape, dtype and device as the argument."""
    if not _is_distributed():
        return counts.detach()
    total = counts.detach().to(_collective_device(counts.device), copy=True)
    dist.all_reduce(total)
    return total.to(counts.device)


def all_gather_rows(tensor_ND: Tensor) -> Tensor:
    """The rows of all workers in rank order, [sum of N, ...], on every worker, without gradients.

    Workers may hold different numbers of rows, none included. Raises ValueError on every worker where the workers'
    rows differ in size.
    """
    if not _is_distributed():
        return tensor_ND
    num_rows = _rows_per_worker(tensor_ND)
    longest = max(num_rows)
    # Gloo gathers equal shapes only, so every worker sends as many rows as the longest; the padding is cut off here.
    padded = tensor_ND.new_zeros((longest, *tensor_ND.shape[1:]), device=_collective_device(tensor_ND.device))
    padded[: len(tensor_ND)] = tensor_ND.detach()
    parts = [part[:rows] for part, rows in zip(_all_gather(padded), num_rows, strict=True)]
    return torch.cat(parts).to(tensor_ND.device)


def row_offset(tensor_ND: Tensor) -> int:
    """Where this worker's first row stands in `all_gather_rows` of the same tensor."""
    if not _is_distributed():
        return 0
    return sum(_rows_per_worker(tensor_ND)[: rank()])


@contextmanager
def fail_together() -> Iterator[None]:
    """A UserError inside, on any worker, is raised on every one at the end: none waits for one that has left."""
    own: str | None = None
    try:
        yield
    except UserError as error:
        own = str(error)
    errors = [own]
    if _is_distributed():
        errors = [None] * world_size()
        dist.all_gather_object(errors, own)
    for message in errors:
        if message is not None:
            raise UserError(message)


def _rows_per_worker(tensor_ND: Tensor) -> list[int]:
    """The number of rows of each worker. Raises ValueError where the workers' rows differ in size."""
    shape = torch.tensor([len(tensor_ND), math.prod(tensor_ND.shape[1:])])
    shapes = [part.tolist() for part in _all_gather(shape.to(_collective_device(tensor_ND.device)))]
    if len({row_size for _, row_size in shapes}) > 1:
        raise ValueError(f"rows differ in size between workers: {[row_size for _, row_size in shapes]} elements")
    return [rows for rows, _ in shapes]


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return parts


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _collective_device(device: torch.device) -> torch.device:
    """Where the process group can work on a tensor of this device: NCCL only on the GPU, gloo safely on the CPU."""
    backend = dist.get_backend()
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else device
