"""Packing captions, so that the text tower computes real tokens and nothing else.

Shape suffixes: B captions; L columns of the token matrix; T real tokens of all captions.

The tower is causal and read at the end token, so what follows the end token changes nothing: leaving it out is
exact. Captions are sorted by length, which puts equal lengths side by side: attention then needs no padding, no
mask and no gathering, only views.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rayclip.models.transformer import Groups


class Packing(NamedTuple):
    """Where the real tokens of a batch of captions go."""

    source_T: Tensor  # int64 [T], the token's place in tokens_BL.flatten()
    position_T: Tensor  # int64 [T], its place in its caption
    end_B: Tensor  # int64 [B], rows of the end tokens, captions sorted by length
    unsort_B: Tensor  # int64 [B], takes sorted captions back to the order they came in
    groups: Groups  # (number of captions, their length), lengths ascending


def pack(num_tokens_B: Tensor, columns: int, device: torch.device) -> Packing:
    """Lay captions out by length.

    Args:
        num_tokens_B: integer [B], real tokens of each caption; is copied to the host if it is not there.
        columns: L, the width of the token matrix.
        device: where the index tensors go, in one copy.

    Raises:
        ValueError: a caption without tokens, or with more than L.
    """
    num_tokens = num_tokens_B.cpu().long()
    if not num_tokens.numel():
        none = torch.empty(0, dtype=torch.long, device=device)
        return Packing(none, none, none, none, [(0, 1)])
    shortest, longest = (int(n) for n in num_tokens.aminmax())
    if shortest < 1 or longest > columns:
        raise ValueError(f"num_tokens must lie in 1..{columns}; it spans {shortest}..{longest}")
    lengths, order = num_tokens.sort(stable=True)
    ends = lengths.cumsum(0)
    position = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
    source = position + (order * columns).repeat_interleave(lengths)
    parts = [source, position, ends - 1, order.argsort()]
    moved = torch.cat(parts).to(device, non_blocking=True).split([part.numel() for part in parts])
    source, position, ends, unsort = moved
    distinct, counts = lengths.unique_consecutive(return_counts=True)
    groups = list(zip(counts.tolist(), distinct.tolist(), strict=True))
    return Packing(source, position, ends, unsort, groups)
