"""Settings of what is measured."""

import sys
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from rayclip.config.base import (
    CachePath,
    Config,
    InputModel,
    InputPath,
    NotPath,
    OutputPath,
    RenamedFrom,
    TrackingUri,
)
from rayclip.config.cluster import WorkersConfig

SuiteTask = Literal["zero_shot", "retrieval", "linear_probe", "few_shot", "corruptions"]
Corruption = Literal["gaussian_noise", "shot_noise", "gaussian_blur", "contrast", "brightness", "jpeg", "pixelate"]
SuiteMetric = Literal[
    "top1",
    "mean_per_class",
    "mean_top1_top5",
    "eleven_point_map",
    "roc_auc",
    "text_to_image.recall_at_1",
    "text_to_image.recall_at_5",
    "text_to_image.recall_at_10",
    "image_to_text.recall_at_1",
    "image_to_text.recall_at_5",
    "image_to_text.recall_at_10",
]
RENAMED_METRICS = {"accuracy": "top1", "image_recall_at_1": "text_to_image.recall_at_1"}
"""What the last release called a metric of a suite, for which training had another name already."""


class ZeroShotTask(Config):
    """Classify pictures by their classes' names alone."""

    metrics: ClassVar[tuple[str, ...]] = ("top1", "top5", "percentile_rank")
    """What checkpoints may be compared by."""

    kind: Literal["zero_shot"] = Field("zero_shot", description="what is measured")
    path: InputPath = Field(description="data set whose samples have a .cls beside the picture, and classnames.txt")
    templates: str | tuple[str, ...] = Field("plain", description="a named template set, or templates with one {}")


class RetrievalTask(Config):
    """Find each picture's caption among all, and each caption's picture."""

    metrics: ClassVar[tuple[str, ...]] = tuple(
        f"{way}.recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    )
    """What checkpoints may be compared by."""

    kind: Literal["retrieval"] = Field("retrieval", description="what is measured")
    path: InputPath = Field(description="data set of pictures with captions")


Task = Annotated[ZeroShotTask | RetrievalTask, Field(discriminator="kind")]


class EvaluationConfig(Config):
    """What is measured during training and after it."""

    tasks: dict[str, Task] = Field({}, description="measurements by name")
    every_samples: int | None = Field(
        None, gt=0, description="how often during training; None measures at the end only"
    )
    best: NotPath | None = Field(None, description="TASK.METRIC that picks the best checkpoint; None takes the last")
    batch_size: int = Field(256, gt=0, description="pictures encoded at once")
    asynchronous: Annotated[bool, RenamedFrom("beside")] = Field(
        False,
        description="during training, measure in a process of its own while workers go on; the last time they do it",
    )
    validation_cpus: Annotated[float, RenamedFrom("beside_cpus")] = Field(
        1, gt=0, description="CPU cores of that process"
    )
    validation_gpus: Annotated[float | None, RenamedFrom("beside_gpus")] = Field(
        None,
        ge=0,
        le=1,
        description="its GPU, whole or a part; 0: none, on its CPU cores; None: one where cluster.use_gpu",
    )

    @property
    def is_asynchronous(self) -> bool:
        """Whether checkpoints are measured during training in a process of its own."""
        return self.asynchronous and bool(self.tasks) and self.every_samples is not None


class DataSetConfig(Config):
    """A data set of a suite. What is not given comes from the entry of that name in evaluation/datasets.yaml."""

    title: str = Field("", description="what people call it; empty: its name")
    path: InputPath | None = Field(None, description="its folder; None: ROOT/NAME, or ROOT/ one of folders")
    folders: tuple[NotPath, ...] = Field(
        (), description="names that others give the folder, as CLIP_benchmark's wds_NAME"
    )
    split: NotPath = Field("test", description="folder within it that is measured; '.' where its shards lie there")
    train_split: NotPath = Field("train", description="folder within it that a linear probe is fitted on")
    validation_split: NotPath | None = Field(
        None, description="folder within it that chooses a probe's strength; None: a fifth of train_split"
    )
    tasks: tuple[SuiteTask, ...] = Field(("zero_shot",), min_length=1, description="what is measured")
    metric: SuiteMetric | None = Field(
        None,
        description="the figure that stands for the data set, as in CLIP's paper; None: top1, eleven_point_map where "
        "labels are multi, text_to_image.recall_at_1 of retrieval alone",
    )
    labels: Literal["single", "multi"] = Field("single", description="multi: any number a picture, 0 or 1 in its .npy")
    num_classes: int | None = Field(None, gt=0, description="classes that the paper counts; another number is noted")
    class_names: tuple[NotPath, ...] | None = Field(
        None, description="None: classnames.txt with the data, or folder names"
    )
    templates: str | tuple[str, ...] | None = Field(
        None, description="a named set, or templates with one {}; None: those with the data, else default_templates"
    )
    default_templates: str | tuple[str, ...] = Field("photo", description="where there are none with the data")
    allow_empty_classes: bool = Field(False, description="whether a class may have no picture")
    corruptions: tuple[Corruption, ...] = Field(
        get_args(Corruption), min_length=1, description="what task corruptions makes pictures worse by, at 5 strengths"
    )
    shift_of: str | None = Field(
        None,
        description="data set with the same classes without shift; where the suite has it, the shift's cost is told",
    )

    @field_validator("metric", mode="before")
    @classmethod
    def _takes_names_of_the_last_release(cls, value: object) -> object:
        if isinstance(value, str) and value in RENAMED_METRICS:
            print(f"note: metric {value} is called {RENAMED_METRICS[value]} now", file=sys.stderr)
            return RENAMED_METRICS[value]
        return value

    @property
    def main_metric(self) -> str:
        """The figure that stands for the data set."""
        if self.metric is not None:
            return self.metric
        if not {"zero_shot", "linear_probe", "few_shot"} & set(self.tasks):
            return "text_to_image.recall_at_1"
        return "eleven_point_map" if self.labels == "multi" else "top1"


class SuiteConfig(Config):
    """rayclip evaluate"""

    model: InputModel = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint or exported weights")
    name: str = Field(description="of the suite")
    datasets: dict[str, DataSetConfig] = Field(min_length=1, description="what is measured on, by name")
    root: InputPath = Field("data", description="folder that data sets without a path lie in")
    require: Literal["all", "any"] = Field("all", description="all: a data set that is not there stops the job")
    output: OutputPath | None = Field(None, description="folder of the report; None: runs/evaluations/NAME/MODEL")
    cache: CachePath = Field("runs/features", description="folder of features, kept for the next task and the next run")
    batch_size: int = Field(256, gt=0, description="pictures, and texts, encoded at once")
    part_samples: int = Field(4096, gt=0, description="samples a part, rounded to whole chunks")
    shots: tuple[int, ...] = Field((1, 2, 4, 8, 16), min_length=1, description="samples a class of task few_shot")
    seeds: int = Field(5, gt=0, description="draws of these samples")
    baselines: tuple[InputPath, ...] = Field(
        (),
        description="other models, whose line effective robustness is told from: rayclip evaluate's reports, folders "
        "of them, or CSVs with a row a model, a column a data set",
    )
    cluster: WorkersConfig = Field(WorkersConfig(), description="what it runs on")
    experiment: str | None = Field(None, description="MLflow experiment that the result is logged to; None: none")
    tracking_uri: TrackingUri | None = Field(None, description="MLflow of models:/..., or None for ./mlflow/mlflow.db")

    @field_validator("datasets", mode="before")
    @classmethod
    def _empty_is_its_entry(cls, value: object) -> object:
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _shifts_are_of_others(self) -> Self:
        for name, dataset in self.datasets.items():
            others = [other for other in self.datasets if other != name]
            if dataset.shift_of is not None and dataset.shift_of not in others:
                there = f"not in the suite: {', '.join(others) or 'it has no other'}"
                raise ValueError(f"data set '{name}' is a shift of '{dataset.shift_of}', which is {there}")
        return self


class CompareConfig(Config):
    """rayclip compare"""

    runs: tuple[InputPath, ...] = Field(min_length=1, description="reports of rayclip evaluate, or folders of them")
    output: OutputPath = Field("runs/comparison", description="folder of the page, the plots and the table")
    experiment: str | None = Field(None, description="MLflow experiment that it is logged to; None: none")
    tracking_uri: TrackingUri | None = Field(None, description="MLflow, or None for ./mlflow/mlflow.db")
