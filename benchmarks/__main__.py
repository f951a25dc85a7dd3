"""Measure a part beside its peer, in the same run: step, loss, tokenizer, text_tower, and others."""

import importlib
import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.config import BenchmarkConfig
from rayclip.cli.command import Command, print_table, run_and_exit


def main(config: BenchmarkConfig) -> dict[str, Any]:
    """Run one benchmark. Returns its figures with what they were measured on. Raises UserError without the peer."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    figures = importlib.import_module(f"benchmarks.{config.name}").run(config)
    cores = f"{os.cpu_count()} cores {platform.machine()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cores
    summary = {"benchmark": config.name, "date": datetime.now(UTC).date().isoformat(), "device": device, **figures}
    print_table([(key, str(value)) for key, value in summary.items()])
    return summary


if __name__ == "__main__":
    run_and_exit(
        Command(
            "python -m benchmarks",
            BenchmarkConfig,
            main,
            lambda config: f"runs/benchmarks/{config.name}.json",
            ("name",),
        )
    )
