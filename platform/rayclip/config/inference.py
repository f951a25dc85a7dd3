"""Settings of jobs that take a trained model: embed, classify, convert."""

from typing import Literal

from pydantic import Field, model_validator

from rayclip.config.base import Config, InputModel, InputPath, NotPath, OutputPath, TrackingUri
from rayclip.config.cluster import WorkersConfig


class EmbedConfig(Config):
    """rayclip embed"""

    model: InputModel = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint or exported weights")
    data: InputPath = Field(description="folder of a data set: tar shards and their manifest.parquet")
    output: OutputPath = Field(
        description="folder that the Parquet parts go to; a run that was interrupted goes on in it"
    )
    what: Literal["pictures", "texts", "both"] = Field("both", description="what is embedded")
    batch_size: int = Field(256, gt=0, description="pictures, and texts, encoded at once")
    part_samples: int = Field(4096, gt=0, description="samples a part, rounded to whole chunks")
    cluster: WorkersConfig = Field(WorkersConfig(), description="what it runs on")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of samples with an error that stops the run")
    tracking_uri: TrackingUri | None = Field(None, description="MLflow of models:/..., or None for ./mlflow/mlflow.db")


class ClassifyConfig(Config):
    """rayclip classify"""

    model: InputModel = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint or exported weights")
    data: InputPath | None = Field(None, description="folder of a data set; this or embeddings")
    embeddings: InputPath | None = Field(None, description="output of rayclip embed by this model, in place of data")
    output: OutputPath = Field(
        description="folder that the Parquet parts go to; a run that was interrupted goes on in it"
    )
    labels: InputPath | tuple[str, ...] = Field(description="the labels, or the path of a file with one a line")
    templates: str | tuple[str, ...] = Field("plain", description="a named template set, or templates with one {}")
    top_k: int = Field(5, gt=0, description="best labels kept for each picture, where there are that many")
    batch_size: int = Field(256, gt=0, description="pictures encoded at once")
    part_samples: int = Field(4096, gt=0, description="samples a part, rounded to whole chunks; embeddings keep theirs")
    cluster: WorkersConfig = Field(WorkersConfig(), description="what it runs on")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of samples with an error that stops the run")
    tracking_uri: TrackingUri | None = Field(None, description="MLflow of models:/..., or None for ./mlflow/mlflow.db")

    @model_validator(mode="after")
    def _check(self) -> "ClassifyConfig":
        if (self.data is None) == (self.embeddings is None):
            raise ValueError("give exactly one of data and embeddings")
        return self


class ConvertConfig(Config):
    """rayclip convert"""

    input: InputModel = Field(description="a checkpoint, exported weights (a folder or a file), or models:/NAME@ALIAS")
    output: OutputPath = Field(description="folder that is written; it must not exist")
    format: Literal["rayclip", "open_clip", "huggingface"] = Field("rayclip", description="what is written")
    model: NotPath | None = Field(
        None, description="preset that a bare state dict is of; None tells by its shapes, and takes GELU"
    )
    tracking_uri: TrackingUri | None = Field(None, description="MLflow of models:/..., or None for ./mlflow/mlflow.db")
