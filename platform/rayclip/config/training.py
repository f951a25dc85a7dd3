"""Settings of a training run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayclip.config.base import Config, Effect, InputModel, InputPath, NotPath, OutputPath, TrackingMark
from rayclip.config.cluster import ClusterConfig
from rayclip.config.data import DataConfig
from rayclip.config.evaluation import EvaluationConfig
from rayclip.config.model import ModelConfig

Precision = Literal["float32", "bfloat16"]


class LossConfig(Config):
    """How pictures and captions are drawn to their partners and away from all others of the batch."""

    kind: Literal["info_nce", "sigmoid"] = Field(
        "info_nce", description="info_nce: CLIP's, each among all; sigmoid: SigLIP's, each pair by itself"
    )
    distribution: Annotated[Literal["gather", "ring"], Effect.SAME_RESULT] = Field(
        "gather", description="gather: captions of all workers at once; ring: one worker's after another's, less memory"
    )
    tile_size: Annotated[int, Effect.SAME_RESULT] = Field(
        1024, gt=0, description="rows and columns of the matrix of scores computed at once"
    )


class OptimizerConfig(Config):
    """AdamW with a warm-up and a schedule. Durations count samples seen."""

    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="decay rates of the two moments")
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.2, ge=0, description="on matrices; gains, biases and the logit scale have none")
    warmup_samples: int = Field(0, ge=0, description="samples over which the rate rises from zero to its peak")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="after the warm-up: half a cosine to zero; or warm-up, stable, decay: constant, then down"
    )
    cooldown_samples: int = Field(
        0, ge=0, description="wsd: last samples, over which the rate falls to zero; 0: a trunk, which stays constant"
    )
    cooldown_shape: Literal["linear", "sqrt"] = Field(
        "sqrt", description="wsd: how the rate falls: 1 - progress; or 1 - sqrt(progress), which ends better"
    )
    max_grad_norm: float | None = Field(None, gt=0, description="clip the gradient to this norm; None does not")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate over that of the layer above it")

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.cooldown_samples and self.schedule != "wsd":
            raise ValueError(f"cooldown_samples is for schedule=wsd, not schedule={self.schedule}; leave it out")
        return self


class EmaConfig(Config):
    """A moving average of the weights, kept and measured beside them."""

    half_life_samples: int = Field(
        gt=0, description="samples seen after which what the weights were counts half of what they are"
    )


class GuardConfig(Config):
    """What is watched in every step, and what is done about it. What is left out is in the ledger, with its cause."""

    action: Literal["stop", "skip", "roll_back"] = Field(
        "stop", description="stop the run; skip the update; or go back to the last checkpoint and past the batch"
    )
    spike_threshold: float | None = Field(
        None, gt=0, description="deviations above the recent losses' median that make a spike; None: none does"
    )
    window: int = Field(64, ge=8, description="recent losses that a spike is measured by; half of them must be there")
    min_logit_scale: float | None = Field(
        1.0, ge=1, description="a logit scale that has fallen to this has collapsed; None does not look"
    )
    max_interventions: Annotated[int, Effect.SAME_RESULT] = Field(
        10, ge=0, description="troubles of a run that are borne; one more stops it"
    )


class CheckpointConfig(Config):
    """When the state of a run is saved."""

    every_samples: int = Field(1_000_000, gt=0, description="samples seen between checkpoints")
    keep: int = Field(3, gt=0, description="how many of the best checkpoints are kept, beside the latest")
    at_samples: tuple[int, ...] = Field(
        (), description="also one at the first step at or after each of these samples, which is always kept"
    )
    record_samples: bool = Field(
        False, description="keep samples.npy in each: (position, row, cause) of every sample since the one before"
    )


class TrackingConfig(Config):
    """Where MLflow keeps runs and versions."""

    uri: Annotated[str, TrackingMark(always=True)] | None = Field(
        None, description="MLflow server, or None for the embedded database ./mlflow/mlflow.db"
    )
    experiment: str = Field("rayclip", description="experiment that the run belongs to")
    artifacts: OutputPath | None = Field(
        None, description="where a new experiment keeps its files, a folder or s3://...; None: where MLflow says"
    )
    register_as: NotPath | None = Field(
        None, description="model name under which the best checkpoint becomes a version"
    )
    alias: str = Field("champion", description="alias that is moved to a new version that is promoted")
    promote: Literal["if_better", "always", "never"] = Field(
        "if_better",
        description="when a new version takes the alias; if_better: evaluation.best, or else the first task's first "
        "metric, is higher than that of the version that has it, on the same data",
    )
    gate: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="TASK.METRIC and the most that a promoted version may lose of it, by its 95% interval's low end"
    )
    log_every_samples: int = Field(10_000, gt=0, description="samples seen between logged points")
    parent_run_id: str | None = Field(None, description="MLflow run that this one is nested in; a sweep sets it")


class TrainConfig(Config):
    """rayclip train"""

    name: Annotated[str, Effect.SAME_IN_TRIALS] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's name"
    )
    runs: Annotated[OutputPath, Effect.SAME_IN_TRIALS] = Field(
        "runs", description="where the run's folder, called NAME, is; a cluster needs one all nodes share"
    )
    seed: Annotated[int, Effect.OF_TRUNK, Effect.SAME_IN_TRIALS] = Field(
        0, ge=0, description="of the weights, the order and the augmentation"
    )
    model: Annotated[str | ModelConfig, Effect.OF_TRUNK] = Field(description="a preset's name, or the model in full")
    weights: InputModel | None = Field(
        None, description="start from these: a checkpoint, exported weights, or models:/..."
    )
    branch_from: InputPath | None = Field(
        None, description="go on from another run's checkpoint, whole: its folder, or FOLDER_OF_RUN@SAMPLES"
    )
    lock: Literal["none", "image", "text"] = Field("none", description="tower that stays as it is (with image: LiT)")
    data: Annotated[DataConfig, Effect.OF_TRUNK] = Field(description="the training data")
    epochs: Annotated[int | None, Effect.SAME_IN_TRIALS] = Field(
        None, gt=0, description="duration in passes over the data; this or samples"
    )
    samples: Annotated[int | None, Effect.SAME_IN_TRIALS] = Field(
        None, gt=0, description="duration in samples seen, rounded up to whole chunks"
    )
    batch_size: Annotated[int, Effect.OF_TRUNK] = Field(
        gt=0, description="pairs a step, over all workers; negatives come from all of them"
    )
    micro_batch_size: Annotated[int | None, Effect.SAME_RESULT] = Field(
        None, gt=0, description="pairs of a worker in the towers at once; fewer take less memory; None: all"
    )
    activation_checkpointing: Annotated[bool, Effect.SAME_RESULT] = Field(
        False, description="compute activations anew in the backward pass, in place of keeping them"
    )
    loss: Annotated[LossConfig, Effect.OF_TRUNK] = Field(LossConfig(), description="what is minimised")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the optimizer")
    precision: Precision = Field("float32", description="of the towers; weights, features and loss stay float32")
    compile: Annotated[bool, Effect.SAME_RESULT] = Field(
        False, description="compile the transformers' token-wise parts; takes a minute at the start"
    )
    guard: GuardConfig = Field(GuardConfig(), description="what is done about a step that goes wrong")
    ema: EmaConfig | None = Field(None, description="a moving average of the weights; None keeps none")
    evaluation: Annotated[EvaluationConfig, Effect.SAME_RESULT, Effect.SAME_IN_TRIALS] = Field(
        EvaluationConfig(), description="what is measured"
    )
    checkpoint: Annotated[CheckpointConfig, Effect.SAME_RESULT] = Field(
        CheckpointConfig(), description="when state is saved"
    )
    tracking: Annotated[TrackingConfig, Effect.SAME_RESULT, Effect.SAME_IN_TRIALS] = Field(
        TrackingConfig(), description="where it is recorded"
    )
    cluster: Annotated[ClusterConfig, Effect.SAME_RESULT, Effect.SAME_IN_TRIALS] = Field(
        ClusterConfig(), description="what it runs on"
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if (self.epochs is None) == (self.samples is None):
            raise ValueError("give exactly one of epochs and samples")
        if self.branch_from is not None and self.weights is not None:
            raise ValueError("branch_from brings its weights: leave weights out")
        if self.samples is not None and self.optimizer.cooldown_samples > self.samples:
            raise ValueError(
                f"optimizer.cooldown_samples {self.optimizer.cooldown_samples} is more than samples {self.samples}"
            )
        workers = self.cluster
        if isinstance(workers.num_workers, int) and self.batch_size % workers.num_workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of cluster.num_workers {workers.num_workers}"
            )
        if self.evaluation.is_asynchronous and workers.min_workers < workers.max_workers:
            raise ValueError(
                f"cluster.num_workers {workers.num_workers} takes all room there is: "
                "evaluation.asynchronous needs one number"
            )
        if self.batch_size < workers.max_workers:
            raise ValueError(f"batch_size {self.batch_size} has no pair for each of {workers.max_workers} workers")
        if (
            isinstance(self.model, ModelConfig)
            and self.model.init_logit_bias is not None
            and self.loss.kind != "sigmoid"
        ):
            raise ValueError("model.init_logit_bias is for loss.kind=sigmoid; leave it out")
        # Here and not when it is first measured: that may be hours later.
        tasks, best = self.evaluation.tasks, self.evaluation.best
        measured = [f"{name}.{metric}" for name, task in tasks.items() for metric in task.metrics]
        if self.ema:
            measured += [f"{name}.ema.{metric}" for name, task in tasks.items() for metric in task.metrics]
        if best is not None and best not in measured:
            raise ValueError(f"evaluation.best '{best}' is not measured; measured: {', '.join(measured) or '-'}")
        return self
