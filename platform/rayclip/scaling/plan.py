"""What a training takes: model, samples and days for a target error or a budget, from a throughput and a law.

C is forward GMACs a pair times samples; training takes 3 x 2 x 1e9 FLOPs of each.
"""

import json
import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from rayclip.config import FitConfig, PlanConfig
from rayclip.errors import UserError, nearest
from rayclip.io.paths import StoragePath
from rayclip.models.presets import PRESETS, preset
from rayclip.scaling.fit import Estimate, Law, NotEnoughError, fit_law
from rayclip.scaling.flops import forward_gmacs, num_parameters, training_flops
from rayclip.scaling.points import Point, read_csv

PEAK_FLOPS = {
    "T4": 65e12,
    "V100": 125e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H200": 989e12,
}
"""Dense bf16 FLOP/s, fp16 for T4 and V100, of the vendor's data sheets: SXM boards where there are several."""

_FLOPS_PER_GMAC = 6e9
_LARGEST_BATCH, _FEWEST_STEPS = 32_768, 10_000  # the CLIP paper's batch
_BYTES_PER_PARAMETER = 12  # float32: the weight and Adam's two moments


@dataclass(frozen=True)
class FittedLaw:
    """A law with the runs that it comes from."""

    law: Law
    points: list[Point]

    @property
    def largest(self) -> float:
        """Compute of the largest run."""
        return max(point.compute for point in self.points)


@dataclass(frozen=True)
class TrainingPlan:
    """What was asked, answered; estimates with the law's interval, notes that say what they rest on.

    `model` is None where the law says the size; `nearest` is then the preset whose GMACs come closest, else the model.
    """

    model: str | None
    nearest: str
    gmacs: float
    samples: Estimate
    compute: Estimate
    error: Estimate | None
    gpu_hours: Estimate
    flops_per_gpu_s: float
    samples_per_s: float
    times_the_largest_run: float | None
    notes: list[str]


def read_law(path: StoragePath) -> FittedLaw:
    """The law of a folder of `rayclip fit`, fitted again to its points: the same resamples, so joint intervals.

    Raises UserError for a folder that is none, and for runs that carry no law.
    """
    summary = path / "summary.json" if path.is_dir() else path
    try:
        said = json.loads(summary.read_text())
        keys = ("form", "frontier", "bins", "resamples", "seed")
        config = FitConfig(source=str(summary), **{key: said[key] for key in keys})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{summary}' is no summary of rayclip fit: {' '.join(str(error).split())}") from None
    runs = read_csv(summary.parent / "points.csv")
    points = [run.point for run in runs if run.point is not None]
    try:
        return FittedLaw(fit_law(points, config), points)
    except NotEnoughError as reason:
        raise UserError(f"'{summary}' carries no law: {reason}") from None


def make_plan(config: PlanConfig, fitted: FittedLaw | None, flops_per_gpu_s: float) -> TrainingPlan:
    """Answer it. Raises UserError for an error that the law never reaches, and for a question with too little in it."""
    compute = _compute(config, fitted, flops_per_gpu_s)
    gmacs, nearest_preset, notes = _model(config, fitted, compute)
    if compute.value is None:
        compute = Estimate(gmacs * _required(config.samples))
    center = _required(compute.value)
    samples = _scaled(compute, 1 / gmacs)
    per_c = _flops_per_compute(config, gmacs)
    hours = _scaled(compute, per_c / flops_per_gpu_s / 3600)
    error = _error(config, fitted, center, gmacs)
    factor = center / fitted.largest if fitted else None
    if config.target_error is not None and compute.high == math.inf:
        notes.append(
            f"target_error {config.target_error:g} may be out of reach: it lies within the 95% interval of the limit"
        )
    if factor and factor > 1:
        notes.append(f"extrapolated: {factor:.3g} times the compute of the largest run of the fit")
    speed = flops_per_gpu_s * config.num_gpus / (per_c * gmacs)
    return TrainingPlan(
        config.model, nearest_preset, gmacs, samples, compute, error, hours, flops_per_gpu_s, speed, factor, notes
    )


def measured_flops(config: PlanConfig, samples_per_s: float | None) -> float:
    """Training FLOP/s of one GPU, as it was measured or as its peak and utilisation say. Raises UserError."""
    if config.flops_per_gpu_s is not None:
        return config.flops_per_gpu_s
    if config.gpu is not None:
        if config.gpu not in PEAK_FLOPS:
            raise UserError(f"gpu '{config.gpu}' is not known: {nearest(config.gpu, list(PEAK_FLOPS))}")
        return PEAK_FLOPS[config.gpu] * config.utilisation
    name = config.measured_model or config.model
    if name is None or samples_per_s is None:
        raise UserError("samples/s say nothing without their model: give measured_model")
    return samples_per_s * training_flops(preset(name), 1) / (config.measured_gpus or config.num_gpus)


def batch_size(config: PlanConfig, samples: float) -> int:
    """Pairs a step: what was asked for, or a rule of thumb."""
    if config.batch_size is not None:
        return config.batch_size
    batch = _LARGEST_BATCH
    while batch > 64 and samples / batch < _FEWEST_STEPS:
        batch //= 2
    return batch


def checkpoint_bytes(model: str) -> int:
    """Weights and optimizer state of a preset."""
    return num_parameters(preset(model)) * _BYTES_PER_PARAMETER


def budget_hours(config: PlanConfig) -> float | None:
    """GPU-hours of the budget, however it was said."""
    if config.days is not None:
        return config.days * 24 * config.num_gpus
    if config.money is not None and config.price_per_gpu_hour is not None:
        return config.money / config.price_per_gpu_hour
    return config.gpu_hours


def _compute(config: PlanConfig, fitted: FittedLaw | None, flops_per_gpu_s: float) -> Estimate:
    """Of the target or the budget; without a value where model and samples say it."""
    hours = budget_hours(config)
    if config.samples is not None and (hours is not None or config.target_error is not None):
        raise UserError("samples follow from the budget or the target: leave samples out")
    if config.target_error is not None and fitted is not None:
        compute = fitted.law.compute_for(config.target_error)
        if compute.value is None:
            raise UserError(f"target_error {config.target_error:g} is out of reach: {compute.reason}")
        return compute
    if hours is not None:
        gmacs = None if config.model is None else forward_gmacs(preset(config.model))
        return Estimate(hours * 3600 * flops_per_gpu_s / _flops_per_compute(config, gmacs))
    if config.model is None or config.samples is None:
        raise UserError("too little to plan with: give target_error, a budget (gpu_hours, days, money) or samples")
    return Estimate(None)


def _model(config: PlanConfig, fitted: FittedLaw | None, compute: Estimate) -> tuple[float, str, list[str]]:
    """GMACs, the preset that has them or comes nearest, and where they are from."""
    if config.model is not None:
        return forward_gmacs(preset(config.model)), config.model, []
    if fitted is None:
        raise UserError("neither a model nor a law: give one of them")
    center = _required(compute.value)
    best = fitted.law.best_model(center)
    if best is not None:
        gmacs, note = _required(best[0].value), "model: the law's best for this compute"
        if best[0].low is not None:
            note += f", between {best[0].low:.3g} and {best[0].high:.3g} GMACs a pair"
    else:
        gmacs, note = _frontier_gmacs(fitted.law, center), "model: along the frontier of the fit's own runs"
    sizes = _preset_gmacs()
    name = min(sizes, key=lambda other: abs(math.log(sizes[other] / gmacs)))
    return gmacs, name, [note, f"nearest preset: {name}, {sizes[name]:.3g} GMACs a pair; checkpoint_bytes are of it"]


@cache
def _preset_gmacs() -> dict[str, float]:
    """Of each preset, counted once: even without weights a large model takes a while to make. GELUs cost the same."""
    return {name: forward_gmacs(model) for name, model in PRESETS.items() if not model.quick_gelu}


def _frontier_gmacs(law: Law, compute: float) -> float:
    """A line of log GMACs over log C through the fitted runs."""
    kept_M = law.runs.weight[0] > 0
    x_M, y_M = law.runs.compute[0][kept_M], law.runs.gmacs[0][kept_M]
    slope, height = np.polyfit(x_M - x_M.mean(), y_M, 1)
    return float(np.exp(height + slope * (math.log(compute) - x_M.mean())))


def _error(config: PlanConfig, fitted: FittedLaw | None, compute: float, gmacs: float) -> Estimate | None:
    if fitted is None:
        return None
    if fitted.law.form.name == "chinchilla" and config.model is not None:
        return fitted.law.error_at(gmacs, compute / gmacs)
    return fitted.law.best_error(compute)


def _flops_per_compute(config: PlanConfig, gmacs: float | None) -> float:
    """Training FLOPs a unit of C: a preset's norms are in its GMACs but in no FLOPs of matrix products."""
    if config.model is None or gmacs is None:
        return _FLOPS_PER_GMAC
    return training_flops(preset(config.model), 1) / gmacs


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    value, low, high = (None if x is None else x * factor for x in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high)


def _required(value: float | None) -> float:
    assert value is not None
    return value
