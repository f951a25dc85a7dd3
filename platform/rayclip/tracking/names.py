"""What metrics are called, for those that do not log them themselves: it imports no MLflow, which takes two seconds."""

from collections.abc import Mapping
from typing import Any

STEP_METRIC = "train/loss"
"""The metric that every recorded step has."""


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
