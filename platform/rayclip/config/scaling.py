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
