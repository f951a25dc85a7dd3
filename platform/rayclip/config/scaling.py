"""Settings of scaling laws."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayclip.config.base import Config
from rayclip.config.model import ModelConfig

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
    """python -m jobs.fit"""

    source: str = Field(description="a CSV with columns name, gmacs, samples, error; or an MLflow experiment's name")
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
    output: str | None = Field(None, description="folder of what is written; None: runs/fits/SOURCE")
    tracking_uri: str | None = Field(None, description="MLflow of an experiment, or None for ./mlflow/mlflow.db")
    log_to: str | None = Field(None, description="experiment the fit is logged to; None: that of the source, if it is")

    @model_validator(mode="after")
    def _check(self) -> "FitConfig":
        if self.form == "chinchilla" and self.frontier not in (None, "all"):
            raise ValueError(f"form=chinchilla is a law of all runs; frontier={self.frontier} is for the others")
        return self
