"""Searching settings: what is tried is a function of the space, a seed and the trial's number."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rayclip.config import Choices, Range, SearchPlan, TrainConfig
from rayclip.config.base import Effect
from rayclip.config.fields import keys_with
from rayclip.config.loader import changed
from rayclip.data.order import uniform
from rayclip.errors import UserError

Values = dict[str, Any]
"""By dotted key of the recipe."""

_DIGITS = 6


def draw(space: Mapping[str, Range | Choices], seed: int, index: int) -> Values:
    """The values of one trial, evenly from the space: the same for the same numbers, whatever is drawn before."""
    places = uniform(seed, index, np.arange(len(space))).tolist()
    return {key: _value_at(span, place) for (key, span), place in zip(space.items(), places, strict=True)}


def trial_name(index: int) -> str:
    """What the trial of that number is called."""
    return f"trial-{index:03}"


def trial_config(base: TrainConfig, name: str, values: Mapping[str, Any]) -> TrainConfig:
    """The recipe with a trial's values. Raises UserError where they do not make a run."""
    config = changed(base, values, f"{name} with {format_values(values)}")
    return config.model_copy(update={"name": name})


def check_space(base: TrainConfig, plan: SearchPlan) -> None:
    """Raise UserError for a key that the recipe has not or that must stay, and for an end that it refuses."""
    for key, span in plan.space.items():
        if key.split(".")[0] in keys_with(TrainConfig, Effect.SAME_IN_TRIALS):
            raise UserError(f"plan.space: '{key}' cannot be searched: trials would not compare")
        for value in span.choices if isinstance(span, Choices) else (span.low, span.high):
            changed(base, {key: value}, "plan.space")


def format_values(values: Mapping[str, Any]) -> str:
    """The values on a line."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _value_at(span: Range | Choices, place: float) -> Any:
    """The value at a place of [0, 1)."""
    if isinstance(span, Choices):
        return span.choices[int(place * len(span.choices))]
    whole = isinstance(span.low, int) and isinstance(span.high, int)
    low, high = span.low, span.high + whole  # each whole number stands for the stretch up to the next
    value = low * math.exp(place * math.log(high / low)) if span.log else low + place * (high - low)
    if whole:
        return min(int(value), span.high)
    return min(max(float(f"{value:.{_DIGITS}g}"), span.low), span.high)
