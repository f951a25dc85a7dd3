"""Settings of what is measured."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rayclip.config.base import Config


class ZeroShotTask(Config):
    """Classify pictures by their classes' names alone."""

    metrics: ClassVar[tuple[str, ...]] = ("top1", "top5")
    """What checkpoints may be compared by."""

    kind: Literal["zero_shot"] = Field("zero_shot", description="what is measured")
    path: str = Field(description="data set whose samples have a .cls beside the picture, and classnames.txt")
    templates: str | tuple[str, ...] = Field("plain", description="a named template set, or templates with one {}")


class RetrievalTask(Config):
    """Find each picture's caption among all, and each caption's picture."""

    metrics: ClassVar[tuple[str, ...]] = tuple(
        f"{way}.recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    )
    """What checkpoints may be compared by."""

    kind: Literal["retrieval"] = Field("retrieval", description="what is measured")
    path: str = Field(description="data set of pictures with captions")


Task = Annotated[ZeroShotTask | RetrievalTask, Field(discriminator="kind")]


class EvaluationConfig(Config):
    """What is measured during training and after it."""

    tasks: dict[str, Task] = Field({}, description="measurements by name")
    every_samples: int | None = Field(
        None, gt=0, description="how often during training; None measures at the end only"
    )
    best: str | None = Field(None, description="TASK.METRIC that picks the best checkpoint; None takes the last")
    batch_size: int = Field(256, gt=0, description="pictures encoded at once")
