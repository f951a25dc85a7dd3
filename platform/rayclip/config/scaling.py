"""Settings of scaling laws."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayclip.config.base import (
    AnyOrInputPath,
    Config,
    Effect,
    InputPath,
    InputPathOrName,
    NotPath,
    OutputPath,
    TrackingUri,
)
from rayclip.config.model import ModelConfig
from rayclip.config.training import TrainConfig

LawForm = Literal["power", "power_limit", "shifted_limit", "chinchilla"]
Frontier = Literal["all", "pareto", "bins"]


class LadderConfig(Config):
    """Model shapes by sample budgets by shares of the data: the runs that a scaling law is fitted to."""

    shapes: dict[str, str | ModelConfig] = Field(
        min_length=1, description="the models by a short name, which their runs' names begin with: presets or in full"
    )
    samples: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1, description="budgets, in samples seen")
    data_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0,), min_length=1, description="shares of the data set"
    )
    schedule: Literal["wsd", "cosine"] = Field(
        "wsd", description="wsd: a trunk for each shape, a cooldown for each budget; cosine: a whole run for each"
    )
    cooldown_share: float = Field(0.2, gt=0, lt=1, description="wsd: share of a budget over which the rate falls")
    warmup_share: float = Field(
        0.1, ge=0, lt=1, description="share of the smallest budget over which the rate rises, in all runs alike"
    )
    max_flops: float | None = Field(
        None, gt=0, description="training FLOPs in all; the dearest rungs are left out until the others fit; None: all"
    )
    rate_exponent: float = Field(
        0.78, ge=0, description="a shape's rate is the recipe's times (recipe's width / shape's) to this power"
    )
    rates: dict[str, float] = Field({}, description="peak rates of shapes that do not follow the rule")
    batch_sizes: dict[str, int] = Field({}, description="batch sizes of shapes that do not take the recipe's")

    @model_validator(mode="after")
    def _check(self) -> "LadderConfig":
        for name in self.shapes:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"shape '{name}' must be letters, digits, '.', '_' and '-': runs are named after it")
        for key in ("rates", "batch_sizes"):
            unknown = getattr(self, key).keys() - self.shapes.keys()
            if unknown:
                raise ValueError(f"{key} names '{min(unknown)}', which is none of shapes: {', '.join(self.shapes)}")
        for key in ("samples", "data_fractions"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key} names one twice: {list(getattr(self, key))}")
        return self


class FitConfig(Config):
    """rayclip fit"""

    source: InputPathOrName = Field(
        description="a CSV with columns name, gmacs, samples, error; or an MLflow experiment's name"
    )
    form: LawForm = Field(
        "power", description="A C^-a; A C^-a + E; A (C + B)^-a + E; A N^-a + B D^-b + E: C is N gmacs times D samples"
    )
    frontier: Frontier = Field(
        "all", description="runs fitted: all; those no other beats for as little C; the best of each bin"
    )
    bins: int = Field(5, ge=2, description="equal bins of log C, for frontier=bins")
    dataset: str | None = Field(None, description="only rows whose column dataset says this")
    metric: str | None = Field(None, description="TASK.METRIC of an experiment, one minus which is the error")
    budget: float | None = Field(None, gt=0, description="compute to plan for: forward GMACs a pair times samples")
    resamples: int = Field(2000, ge=100, description="of the runs, for the intervals")
    seed: int = Field(0, ge=0, description="of the resampling")
    output: OutputPath | None = Field(None, description="folder of what is written; None: runs/fits/SOURCE")
    tracking_uri: TrackingUri | None = Field(
        None, description="MLflow of an experiment, or None for ./mlflow/mlflow.db"
    )
    log_to: str | None = Field(None, description="experiment the fit is logged to; None: that of the source, if it is")

    @model_validator(mode="after")
    def _check(self) -> "FitConfig":
        if self.form == "chinchilla" and self.frontier not in (None, "all"):
            raise ValueError(f"form=chinchilla is a law of all runs; frontier={self.frontier} is for the others")
        return self


class Range(Config):
    """A value between two ends, both included; a whole number where both are."""

    low: int | float = Field(description="smallest value")
    high: int | float = Field(description="largest value")
    log: bool = Field(False, description="spread evenly over the logarithm")

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log=true needs low above 0, not {self.low:g}")
        return self


class Choices(Config):
    """One of several values."""

    choices: tuple[AnyOrInputPath, ...] = Field(min_length=1, description="the values")


class LadderPlan(LadderConfig):
    """The runs of a ladder, and the law that is fitted to them."""

    kind: Literal["ladder"] = Field("ladder", description="what is swept")
    form: Annotated[LawForm, Effect.SAME_RESULT] = Field("chinchilla", description="the law's form, as in rayclip fit")
    frontier: Annotated[Frontier, Effect.SAME_RESULT] = Field("all", description="runs that are fitted, as there")


class SearchPlan(Config):
    """Settings of the recipe that are searched for their best."""

    kind: Literal["search"] = Field("search", description="what is swept")
    space: dict[str, Range | Choices] = Field(min_length=1, description="any dotted keys of base, and their values")
    algorithm: Literal["random", "asha", "tpe"] = Field(
        "random",
        description="random: all to their end; asha: stops those behind; tpe: Optuna's, learns from those before",
    )
    num_trials: Annotated[int, Effect.SAME_RESULT] = Field(gt=0, description="settings that are tried")
    mode: Literal["max", "min"] = Field("max", description="which metric is best")
    grace_samples: int | None = Field(None, gt=0, description="asha: samples seen before a trial may be stopped")
    stop_by: str | None = Field(
        None, description="asha: TASK.METRIC that it compares, best one that moves early; None: the sweep's metric"
    )
    reduction_factor: float = Field(3, gt=1, description="asha: one in so many goes on at each look")
    seed: int = Field(0, ge=0, description="of the settings that are tried")

    @model_validator(mode="after")
    def _check(self) -> "SearchPlan":
        if (self.algorithm == "asha") != (self.grace_samples is not None):
            raise ValueError("grace_samples is for algorithm=asha, which needs it")
        if self.stop_by is not None and self.algorithm != "asha":
            raise ValueError("stop_by is for algorithm=asha")
        return self


class SweepConfig(Config):
    """rayclip sweep"""

    name: NotPath = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the sweep's name, and its folder's")
    sweeps: OutputPath = Field("runs/sweeps", description="where that folder is; a cluster needs one all nodes share")
    metric: str = Field(description="TASK.METRIC of base that trials are compared by; the error is one minus it")
    plan: Annotated[LadderPlan | SearchPlan, Field(discriminator="kind")] = Field(description="the trials")
    base: TrainConfig = Field(description="the recipe, as in rayclip train; its name is the sweep's where it has none")
    max_concurrent: int | None = Field(None, gt=0, description="trials at a time; None: as many as the cluster places")
    max_failures: int = Field(2, ge=0, description="times that a trial whose processes die is begun again")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """What a plan decides, the recipe need not say."""
        if not isinstance(values, dict) or not isinstance(values.get("base"), dict):
            return values
        base = {"name": values.get("name"), **values["base"]}
        plan = values.get("plan")
        if isinstance(plan, dict) and plan.get("samples") and not base.keys() & {"samples", "epochs"}:
            base["samples"] = max(plan["samples"])
        return {**values, "base": base}

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        evaluation, workers = self.base.evaluation, self.base.cluster
        if workers.min_workers < workers.max_workers:
            raise ValueError(f"base.cluster.num_workers {workers.num_workers} must be one number: trials would differ")
        measured = [f"{name}.{metric}" for name, task in evaluation.tasks.items() for metric in task.metrics]
        stop_by = self.plan.stop_by if isinstance(self.plan, SearchPlan) else None
        for key, metric in {"metric": self.metric, "plan.stop_by": stop_by}.items():
            if metric is not None and metric not in measured:
                raise ValueError(f"{key} '{metric}' is not measured; measured: {', '.join(measured) or '-'}")
        if isinstance(self.plan, SearchPlan) and self.plan.grace_samples is not None:
            every = evaluation.every_samples
            if every is None or every > self.plan.grace_samples:
                raise ValueError(
                    f"base.evaluation.every_samples {every} must be at most plan.grace_samples "
                    f"{self.plan.grace_samples}: trials are compared where they are measured"
                )
            if evaluation.asynchronous:
                raise ValueError("base.evaluation.asynchronous: a trial waits to hear whether it goes on; leave it out")
        return self


class PlanConfig(Config):
    """rayclip plan"""

    law: InputPath | None = Field(None, description="a fit: the folder of rayclip fit, or its summary.json")
    target_error: float | None = Field(None, gt=0, lt=1, description="error to reach, by the law")
    gpu_hours: float | None = Field(None, gt=0, description="budget in hours of one GPU")
    days: float | None = Field(None, gt=0, description="budget in days of num_gpus")
    money: float | None = Field(None, gt=0, description="budget in what price_per_gpu_hour counts")
    model: str | None = Field(None, description="a preset; None takes the size that the law or its runs say")
    samples: float | None = Field(None, ge=1, description="pairs seen; None follows from the law or the budget")
    unique_samples: float | None = Field(None, ge=1, description="pairs there are, for the number of epochs")
    num_gpus: int = Field(1, ge=1, description="that train together")
    flops_per_gpu_s: float | None = Field(None, gt=0, description="measured training FLOP/s of one GPU: the surest")
    samples_per_s: float | None = Field(None, gt=0, description="measured samples/s of measured_model on measured_gpus")
    run: InputPath | None = Field(None, description="summary.json of rayclip train, for samples_per_s")
    measured_model: str | None = Field(None, description="preset that samples_per_s is of; None: model")
    measured_gpus: int | None = Field(None, ge=1, description="GPUs that samples_per_s is of; None: num_gpus")
    gpu: str | None = Field(None, description="a known GPU, whose published peak times utilisation is taken")
    utilisation: float = Field(0.3, gt=0, le=1, description="share of the peak that training reaches, with gpu")
    price_per_gpu_hour: float | None = Field(None, gt=0, description="in any currency")
    batch_size: int | None = Field(None, ge=2, description="None: 32,768, halved until a run has 10,000 steps")
    loader_samples_per_core_s: float | None = Field(None, gt=0, description="pairs that one core decodes, measured")
    bytes_per_pair: float | None = Field(None, gt=0, description="mean bytes of a stored pair")

    @model_validator(mode="after")
    def _check(self) -> "PlanConfig":
        _at_most_one(self, "target_error", "gpu_hours", "days", "money")
        if _at_most_one(self, "flops_per_gpu_s", "samples_per_s", "run", "gpu") == 0:
            raise ValueError("a throughput is needed: give flops_per_gpu_s, samples_per_s, run or gpu")
        if self.money is not None and self.price_per_gpu_hour is None:
            raise ValueError("money needs price_per_gpu_hour")
        if self.target_error is not None and self.law is None:
            raise ValueError("target_error needs a law")
        return self


def _at_most_one(config: Config, *keys: str) -> int:
    given = [key for key in keys if getattr(config, key) is not None]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(given)}")
    return len(given)
