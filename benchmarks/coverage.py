"""How often a law's 95% intervals hold the law: made-up runs about known ones, for every form and choice of runs.

Runs are models of 0.1 to 100 GMACs over 1M to 3B samples, spread evenly over the logarithms; their errors are off the
law's by a share of normal noise. The law is true for all of them: a frontier is picked by the noise alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.config import BenchmarkConfig
from rayclip.config import FitConfig, Frontier, LawForm
from rayclip.scaling.fit import NotEnoughError, fit_law
from rayclip.scaling.points import Point

LawOfRuns = Callable[[np.ndarray, np.ndarray], np.ndarray]
_RESAMPLES = 200
"""Enough: an interval of few is less steady, and in the mean covers as much."""


@dataclass(frozen=True)
class Known:
    """A law: the error for GMACs and samples, and its figures."""

    error: LawOfRuns
    figures: dict[str, float]


KNOWN: dict[LawForm, Known] = {
    "power": Known(
        lambda gmacs, samples: 5.858 * (gmacs * samples) ** -0.111,
        {"coefficient": 5.858, "exponent": 0.111},
    ),
    "power_limit": Known(
        lambda gmacs, samples: 0.12 + 40 * (gmacs * samples) ** -0.25,
        {"coefficient": 40, "exponent": 0.25, "limit": 0.12},
    ),
    "shifted_limit": Known(
        lambda gmacs, samples: 0.12 + 40 * (gmacs * samples + 1e8) ** -0.25,
        {"coefficient": 40, "exponent": 0.25, "limit": 0.12},
    ),
    "chinchilla": Known(
        lambda gmacs, samples: 0.1 + 0.3 * gmacs**-0.3 + 40 * samples**-0.3,
        {"exponent": 0.15, "limit": 0.1, "size_exponent": 0.3, "samples_exponent": 0.3},
    ),
}
_FRONTIERS: tuple[Frontier, ...] = ("all", "pareto", "bins")
_BINS: dict[LawForm, int] = {"shifted_limit": 8}
"""Where five points are too few for the form."""
_RUNS_AND_NOISE: dict[LawForm, list[tuple[int, float]]] = {
    "power": [(12, 0.02), (20, 0.02), (40, 0.1)],
    "power_limit": [(20, 0.01), (40, 0.01)],
    "shifted_limit": [(40, 0.01)],
    "chinchilla": [(24, 0.01), (40, 0.01)],
}


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Shares of the draws whose interval holds the figure, a row a case."""
    covered: dict[str, Any] = {"draws": config.draws, "resamples": _RESAMPLES}
    for form, cases in _RUNS_AND_NOISE.items():
        for frontier in _FRONTIERS if form != "chinchilla" else _FRONTIERS[:1]:
            for count, noise in cases:
                key = f"{form} frontier={frontier} runs={count} noise={noise:g}"
                covered[key] = coverage(form, frontier, count, noise, config.draws)
    return covered


def coverage(form: LawForm, frontier: Frontier, count: int, noise: float, draws: int) -> dict[str, float]:
    """Share of the intervals that hold each figure, of the draws that carry a law."""
    known, generator = KNOWN[form], np.random.default_rng(0)
    config = FitConfig(source="-", form=form, frontier=frontier, bins=_BINS.get(form, 5), resamples=_RESAMPLES)
    held, fitted = dict.fromkeys(known.figures, 0), 0
    for _ in range(draws):
        try:
            estimates = fit_law(draw(known.error, count, noise, generator), config).estimates()
        except NotEnoughError:
            continue
        fitted += 1
        for name, value in known.figures.items():
            low, high = estimates[name].low, estimates[name].high
            held[name] += low is not None and high is not None and low <= value <= high
    return {name: round(number / max(fitted, 1), 4) for name, number in held.items()} | {"carried": fitted / draws}


def draw(law: LawOfRuns, count: int, noise: float, generator: np.random.Generator) -> list[Point]:
    """Runs about a law."""
    gmacs, samples = 10 ** generator.uniform(-1, 2, count), 10 ** generator.uniform(6, 9.5, count)
    error = law(gmacs, samples) * np.exp(noise * generator.standard_normal(count))
    return [Point(*map(float, values)) for values in zip(gmacs, samples, error, strict=True)]
