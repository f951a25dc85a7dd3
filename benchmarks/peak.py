"""How much arithmetic the device can do at the most."""

import time

import torch

from rayclip.config import Precision
from rayclip.errors import UserError

# Dense bfloat16 FLOP/s as published, by a part of the card's name; the first that fits.
_PUBLISHED = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """FLOP/s at the most, and where the figure is from: a GPU's bfloat16 as published, else a large product, timed.

    Raises UserError for a GPU whose figure is not known.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in _PUBLISHED.items():
            if part in name:
                return flops, f"published for {part}, dense bfloat16"
        raise UserError(f"no peak is known for '{name}': add it to {__name__}, which has {', '.join(_PUBLISHED)}")
    return _measured_peak(device, precision), f"a {precision} product of 2,048 squared, best of 10"


def _measured_peak(device: torch.device, precision: Precision, size: int = 2048) -> float:
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, precision)) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
