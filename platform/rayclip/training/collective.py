"""What ranks tell each other beside gradients. Without a process group every function answers for one rank."""

import numpy as np
import torch
import torch.distributed as dist


def rank() -> int:
    """This process among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_counts(counts: list[int], device: torch.device) -> list[list[int]]:
    """Every rank's counts, by rank."""
    if world_size() == 1:
        return [counts]
    mine = torch.tensor(counts, dtype=torch.int64, device=device)
    all_counts = mine.new_empty(world_size() * len(counts))
    dist.all_gather_into_tensor(all_counts, mine)
    return all_counts.view(world_size(), -1).tolist()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of a detached scalar over all ranks."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather_rows(rows: np.ndarray, device: torch.device) -> np.ndarray:
    """All ranks' rows of an int64 [n, columns] array, in order of rank; n may differ."""
    if world_size() == 1:
        return rows
    sizes = [n for (n,) in gather_counts([len(rows)], device)]
    padded = torch.zeros(max(sizes), rows.shape[1], dtype=torch.int64, device=device)
    padded[: len(rows)] = torch.from_numpy(rows).to(device)
    gathered = padded.new_empty(len(sizes) * len(padded), rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded)
    parts = gathered.cpu().numpy().reshape(len(sizes), len(padded), -1)
    return np.concatenate([part[:size] for part, size in zip(parts, sizes, strict=True)])
