"""What each run of a sweep cost and gave: rows of a table that laws are fitted to."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayclip.config import ModelConfig, TrainConfig
from rayclip.io.files import write_text
from rayclip.io.paths import StoragePath
from rayclip.scaling.flops import forward_gmacs, num_parameters, training_flops

Row = dict[str, Any]


@dataclass(frozen=True)
class Counted:
    """What one pair costs a model. `training_flops` is with the captions' real tokens, of which some were counted."""

    parameters: int
    gmacs: float
    training_flops: float
    training_flops_full_context: int


def count(model: ModelConfig, lengths: Sequence[int]) -> Counted:
    """The cost of a pair; `lengths` are the tokens of a sample of captions."""
    real = training_flops(model, len(lengths), lengths) / len(lengths)
    return Counted(num_parameters(model), forward_gmacs(model), real, training_flops(model, 1))


def make_row(
    config: TrainConfig, cost: Counted, status: str, outcome: Mapping[str, Any], shape: str | None = None
) -> Row:
    """A run's row. `outcome` has what is known of a run that has ended: `samples`, `unique_samples`, `train_loss`,
    `metrics` (TASK.METRIC), `error`, `wall_time_s`, `device`; of others nothing.
    """
    samples = outcome.get("samples")
    return {
        "name": config.name,
        **({"shape": shape} if shape else {}),
        "status": status,
        "parameters": cost.parameters,
        "samples": samples,
        "unique_samples": outcome.get("unique_samples"),
        "gmacs": cost.gmacs,
        "training_flops": samples and round(samples * cost.training_flops),
        "training_flops_full_context": samples and samples * cost.training_flops_full_context,
        "train_loss": outcome.get("train_loss"),
        "error": outcome.get("error"),
        **outcome.get("metrics", {}),
        "wall_time_s": outcome.get("wall_time_s"),
        "device": outcome.get("device"),
    }


def write_rows(path: StoragePath, rows: Sequence[Row]) -> None:
    """Write a CSV, whole and then named; what a row does not know is left empty."""
    columns = list(dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _format_value(value) for key, value in row.items()} for row in rows)
    write_text(path, file.getvalue())


def _format_value(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value
