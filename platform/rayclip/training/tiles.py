"""Walking over a matrix of scores in tiles, so that it is never whole."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def tiles(num_rows: int, num_columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile, row of tiles after row of tiles; the last ones are smaller where need be."""
    for row in range(0, num_rows, size):
        for column in range(0, num_columns, size):
            yield slice(row, min(row + size, num_rows)), slice(column, min(column + size, num_columns))


def wide(features: Tensor) -> Tensor:
    """In float32 at the least, as scores are computed and sums added up."""
    return features.to(wide_dtype(features))


def wide_dtype(features: Tensor) -> torch.dtype:
    """float32, or the features' own type where that is wider."""
    return torch.promote_types(features.dtype, torch.float32)


def full_precision(features: Tensor) -> AbstractContextManager[None]:
    """No autocast, wherever the loss is called: products of half precision would lose its last digits."""
    return torch.autocast(features.device.type, enabled=False)


def inner_product(a_BD: Tensor, b_BD: Tensor, size: int) -> Tensor:
    """The sum of all products of elements, some rows at a time."""
    parts = zip(a_BD.split(size), b_BD.split(size), strict=True)
    return torch.stack([(a * b).sum() for a, b in parts]).sum()
