"""Which of a sample's captions is read: drawn by weight, the same one whenever the same sample of a run is met."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rayclip.data.formats.base import USUAL_KEYS, Sample

DRAW = 1 << 16
"""The number of the draw that chooses a caption, among those of a sample (data/order.py)."""

Choice = tuple[str, float]
"""A caption and its weight."""


def choose_caption(sample: Sample, weights: Mapping[str, float], draw: float) -> Sample:
    """The sample with the caption that `draw` in [0, 1) picks as its `txt`; without one where it has none.

    `weights` are by "txt" or a key of the sample's JSON; those that a sample lacks are passed over. Without weights it
    is `txt`, or else the JSON's caption. A key may hold several: ["a dog", "a brown dog"], or with weights of their
    own [{"text": "a dog", "weight": 2}, ...].
    """
    if not weights and "txt" in sample:
        return sample
    try:
        choices = _choices(sample, weights)
    except UnicodeDecodeError:
        return {**sample, "__no_caption__": b"caption_not_utf8"}
    except ValueError:  # no JSON
        choices = []
    rest = {name: data for name, data in sample.items() if name != "txt"}
    return rest | {"txt": _draw(choices, draw)} if choices else rest


def _choices(sample: Sample, weights: Mapping[str, float]) -> list[tuple[bytes, float]]:
    content = json.loads(sample["json"].decode()) if "json" in sample and set(weights) != {"txt"} else {}
    content = content if isinstance(content, dict) else {}
    if not weights:
        key = next((key for key in USUAL_KEYS if content.get(key)), None)
        weights = {key: 1.0} if key else {}
    choices: list[tuple[bytes, float]] = []
    for key, weight in weights.items():
        if key == "txt" and "txt" in sample:
            choices.append((sample["txt"], weight))
        else:
            inner = _spread(content.get(key))
            total = sum(share for _, share in inner)
            choices += [(text.encode("utf-8", "surrogatepass"), weight * share / total) for text, share in inner]
    return [(text, weight) for text, weight in choices if weight > 0]


def _spread(value: Any) -> list[Choice]:
    """The captions under a key, with their shares of its weight."""
    items: Sequence[Any] = value if isinstance(value, list) else [value]
    choices = []
    for item in items:
        text, weight = item, 1.0
        if isinstance(item, dict):
            text = next((item[key] for key in ("text", "caption") if key in item), None)
            weight = item.get("weight", 1.0)
        if isinstance(text, str) and text.strip() and isinstance(weight, int | float) and weight > 0:
            choices.append((text, float(weight)))
    return choices


def _draw(choices: Sequence[tuple[bytes, float]], draw: float) -> bytes:
    left = draw * sum(weight for _, weight in choices)
    for text, weight in choices:
        left -= weight
        if left < 0:
            return text
    return choices[-1][0]
