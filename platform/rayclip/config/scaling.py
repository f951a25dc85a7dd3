"""Settings of scaling laws."""

from typing import Literal

from pydantic import Field, model_validator

from rayclip.config.base import Config

LawForm = Literal["power", "power_limit", "shifted_limit", "chinchilla"]
Frontier = Literal["all", "pareto", "bins"]


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


class PlanConfig(Config):
    """python -m jobs.plan"""

    law: str | None = Field(None, description="a fit: the folder of jobs.fit, or its summary.json")
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
    run: str | None = Field(None, description="summary.json of jobs.train, for samples_per_s")
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
