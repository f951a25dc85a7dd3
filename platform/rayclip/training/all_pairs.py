"""Showing the rows of every rank to every rank, and bringing home what each has to add for them.

Two ways to one end. Gathered: a rank has all rows at once, and there is one collective each way. Ring: rows go from
rank to rank while they are worked on; a rank holds, beside its own, those it works on and those about to come.

Shapes: R ranks; B rows of this rank, M of the rank whose rows are shown, L of the rank that has most.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rayclip.distributed import rank
from rayclip.training.tiles import wide_dtype

PairKernel = Callable[[int, Sequence[Tensor], Tensor], None]
"""Gets a rank, its rows, each [M, ...], and their sums, [M, ...], to which it adds in place."""


class Sums(NamedTuple):
    """What is added up for each row: a tensor of `shape` that begins with `start`, which adds nothing."""

    shape: tuple[int, ...]
    start: float
    combine: Callable[[Tensor], Tensor]  # [R, B, *shape] -> [B, *shape], one sum of several


def all_pairs_reduce(
    rows: Sequence[Tensor], sums: Sums, batch_sizes: list[int], distribution: str, kernel: PairKernel
) -> Tensor:
    """Call `kernel` on every rank once for every rank.

    `rows` are this rank's tensors, [B, ...]; `batch_sizes` holds every rank's B, which may differ and may be zero;
    `distribution` is "gather" or "ring". Returns what all visits added for this rank's rows, [B, *sums.shape].
    """
    if len(batch_sizes) > 1 and distribution == "gather":
        return _gathered(rows, sums, batch_sizes, kernel)
    sums_B = _start(rows[0], sums, len(rows[0]))
    if len(batch_sizes) > 1:
        return _ring(rows, sums_B, batch_sizes, kernel)
    kernel(0, rows, sums_B)
    return sums_B


def _start(like: Tensor, sums: Sums, *size: int) -> Tensor:
    return like.new_full((*size, *sums.shape), sums.start, dtype=wide_dtype(like))


def _gathered(rows: Sequence[Tensor], sums: Sums, batch_sizes: list[int], kernel: PairKernel) -> Tensor:
    # Collectives want one shape on every rank, so shorter ranks send padding that is cut off again.
    longest = max(batch_sizes)
    everyone = [_all_gather(part, len(batch_sizes), longest) for part in rows]
    sums_RL = _start(rows[0], sums, len(batch_sizes), longest)
    for owner, size in enumerate(batch_sizes):
        kernel(owner, [part_RL[owner, :size] for part_RL in everyone], sums_RL[owner, :size])
    for_me_RL = torch.empty_like(sums_RL)
    dist.all_to_all_single(for_me_RL, sums_RL)
    return sums.combine(for_me_RL[:, : len(rows[0])])


def _all_gather(rows_B: Tensor, num_ranks: int, longest: int) -> Tensor:
    """[B, ...] -> [R, L, ...]"""
    padded_L = rows_B.new_zeros(longest, *rows_B.shape[1:])
    padded_L[: len(rows_B)] = rows_B
    gathered_RL = rows_B.new_empty(num_ranks, *padded_L.shape)
    dist.all_gather_into_tensor(gathered_RL.flatten(0, 1), padded_L)
    return gathered_RL


def _ring(rows: Sequence[Tensor], sums_B: Tensor, batch_sizes: list[int], kernel: PairKernel) -> Tensor:
    num_ranks, mine = len(batch_sizes), rank()
    for step in range(num_ranks):
        owner, following = (mine - step) % num_ranks, (mine - step - 1) % num_ranks
        # Rows travel while they are worked on, and need not come home; sums travel when they are added to.
        moving = [_Move(part, batch_sizes[following], tag) for tag, part in enumerate(rows) if following != mine]
        kernel(owner, rows, sums_B)
        sums_B = _Move(sums_B, batch_sizes[following], len(rows)).wait()
        rows = [move.wait() for move in moving]
    return sums_B


class _Move:
    """Rows on their way to the next rank, while as many as it has come from the one before."""

    def __init__(self, rows_B: Tensor, num_coming: int, tag: int) -> None:
        ranks = dist.get_world_size()
        self._sent = rows_B.contiguous()
        self._coming = rows_B.new_empty(num_coming, *rows_B.shape[1:])
        operations = [
            dist.P2POp(dist.isend, self._sent, (rank() + 1) % ranks, tag=tag),
            dist.P2POp(dist.irecv, self._coming, (rank() - 1) % ranks, tag=tag),
        ]
        # Both ends know how many rows there are, and neither waits for none.
        operations = [operation for operation in operations if len(operation.tensor)]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """Return the rows that have come, once all of them are there."""
        for work in self._works:
            work.wait()
        return self._coming
