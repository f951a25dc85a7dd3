"""Every job's settings: pydantic, frozen, unknown keys refused, each key described once, here."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Config(BaseModel):
    """Base of all settings: immutable, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"heads {heads} does not divide width {width}")


class VisionConfig(Config):
    """The image tower: a Vision Transformer."""

    kind: Literal["vit"] = Field("vit", description="a Vision Transformer; the default")
    image_size: int = Field(224, gt=0, description="side of the square input picture, in pixels")
    patch_size: int = Field(32, gt=0, description="side of a patch, in pixels; divides image_size")
    width: int = Field(768, gt=0, description="width of the residual stream")
    layers: int = Field(12, gt=0, description="number of transformer blocks")
    heads: int = Field(12, gt=0, description="attention heads; divides width")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the MLP over that of the stream, the product rounded")
    patch_dropout: float = Field(0.0, ge=0, lt=1, description="share of a picture's patches that training leaves out")

    @model_validator(mode="after")
    def _divisible(self) -> "VisionConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        _check_heads(self.width, self.heads)
        return self


class ResNetConfig(Config):
    """The image tower: the CLIP paper's modified ResNet, with attention pooling."""

    kind: Literal["resnet"] = Field("resnet", description="a modified ResNet")
    image_size: int = Field(224, gt=0, multiple_of=32, description="side of the square input picture, in pixels")
    width: int = Field(64, gt=0, multiple_of=2, description="channels after the stem; the pool has half as many heads")
    layers: tuple[int, int, int, int] = Field((3, 4, 6, 3), description="bottleneck blocks of each of the four stages")

    @model_validator(mode="after")
    def _no_empty_stage(self) -> "ResNetConfig":
        if min(self.layers) < 1:
            raise ValueError(f"layers {list(self.layers)} must be four numbers of at least 1")
        return self


class TextConfig(Config):
    """The text tower: a causal transformer read at the end token."""

    context_length: int = Field(77, gt=2, description="most tokens a caption may have, start and end included")
    vocab_size: int = Field(49_408, gt=2, description="size of the byte-pair vocabulary")
    width: int = Field(512, gt=0, description="width of the residual stream")
    layers: int = Field(12, gt=0, description="number of transformer blocks")
    heads: int = Field(8, gt=0, description="attention heads; divides width")

    @model_validator(mode="after")
    def _divisible(self) -> "TextConfig":
        _check_heads(self.width, self.heads)
        return self


class ModelConfig(Config):
    """A CLIP: two towers and the space they share."""

    embed_dim: int = Field(512, gt=0, description="dimension of the shared space")
    vision: VisionConfig | ResNetConfig = Field(VisionConfig(), discriminator="kind", description="the image tower")
    text: TextConfig = Field(TextConfig(), description="the text tower")
    quick_gelu: bool = Field(False, description="x * sigmoid(1.702 x) in place of GELU, as in OpenAI's weights")
    init_logit_scale: float = Field(math.log(1 / 0.07), ge=0, le=math.log(100), description="the scale's logarithm")
    init_logit_bias: float | None = Field(None, description="added to scores, for loss.kind=sigmoid; None has no bias")

    @field_validator("vision", mode="before")
    @classmethod
    def _kind(cls, vision: Any) -> Any:
        """A tower that does not say its kind is a Vision Transformer: once there were no others."""
        return {"kind": "vit", **vision} if isinstance(vision, dict) else vision


class DataConfig(Config):
    """What a training run reads, and how it looks at it."""

    path: str = Field(description="folder of a data set: tar shards and their manifest.parquet")
    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="share of the picture's area that a crop keeps")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="a crop's width over its height")
    shuffle_window: int = Field(8, gt=0, description="chunks fetched together, their samples mixed among each other")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of unreadable samples that stops the run")


class LossConfig(Config):
    """How pictures and captions are drawn to their partners and away from all others of the batch."""

    kind: Literal["info_nce", "sigmoid"] = Field(
        "info_nce", description="info_nce: CLIP's, each among all; sigmoid: SigLIP's, each pair by itself"
    )
    distribution: Literal["gather", "ring"] = Field(
        "gather", description="gather: captions of all workers at once; ring: one worker's after another's, less memory"
    )
    tile_size: int = Field(1024, gt=0, description="rows and columns of the matrix of scores computed at once")


class OptimizerConfig(Config):
    """AdamW with warm-up and a cosine to zero. Durations count samples seen."""

    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="decay rates of the two moments")
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.2, ge=0, description="on matrices; gains, biases and the logit scale have none")
    warmup_samples: int = Field(0, ge=0, description="samples over which the rate rises from zero to its peak")
    max_grad_norm: float | None = Field(None, gt=0, description="clip the gradient to this norm; None does not")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate over that of the layer above it")


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
    max_interventions: int = Field(10, ge=0, description="troubles of a run that are borne; one more stops it")


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


class CheckpointConfig(Config):
    """When the state of a run is saved."""

    every_samples: int = Field(1_000_000, gt=0, description="samples seen between checkpoints")
    keep: int = Field(3, gt=0, description="how many of the best checkpoints are kept, beside the latest")
    record_samples: bool = Field(
        False, description="keep samples.npy in each: (position, row, cause) of every sample since the one before"
    )


class TrackingConfig(Config):
    """Where MLflow keeps runs and versions."""

    uri: str | None = Field(None, description="MLflow server, or None for the embedded database ./mlflow/mlflow.db")
    experiment: str = Field("rayclip", description="experiment that the run belongs to")
    register_as: str | None = Field(None, description="model name under which the best checkpoint becomes a version")
    alias: str = Field("champion", description="alias that is moved to the new version")
    log_every_samples: int = Field(10_000, gt=0, description="samples seen between logged points")


class ClusterConfig(Config):
    """What a run takes of the cluster."""

    num_workers: int = Field(1, gt=0, description="DDP processes")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores of each")
    use_gpu: bool = Field(False, description="one GPU for each")
    max_failures: int = Field(3, ge=-1, description="restarts after a crash before the run fails; -1 has no limit")


Precision = Literal["float32", "bfloat16"]


class TrainConfig(Config):
    """python -m jobs.train"""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's name; its folder is runs/NAME")
    seed: int = Field(0, ge=0, description="of the weights, the order and the augmentation")
    model: str | ModelConfig = Field(description="a preset's name, or the model in full")
    weights: str | None = Field(None, description="start from these: a checkpoint, exported weights, or models:/...")
    lock: Literal["none", "image", "text"] = Field("none", description="tower that stays as it is (with image: LiT)")
    data: DataConfig = Field(description="the training data")
    epochs: int | None = Field(None, gt=0, description="duration in passes over the data; this or samples")
    samples: int | None = Field(None, gt=0, description="duration in samples seen, rounded up to whole chunks")
    batch_size: int = Field(gt=0, description="pairs a step, over all workers; negatives come from all of them")
    micro_batch_size: int | None = Field(
        None, gt=0, description="pairs of a worker in the towers at once; fewer take less memory; None: all"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations anew in the backward pass, in place of keeping them"
    )
    loss: LossConfig = Field(LossConfig(), description="what is minimised")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the optimizer")
    precision: Precision = Field("float32", description="of the towers; weights, features and loss stay float32")
    compile: bool = Field(False, description="compile the transformers' token-wise parts; takes a minute at the start")
    guard: GuardConfig = Field(GuardConfig(), description="what is done about a step that goes wrong")
    ema: EmaConfig | None = Field(None, description="a moving average of the weights; None keeps none")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="what is measured")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when state is saved")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where it is recorded")
    cluster: ClusterConfig = Field(ClusterConfig(), description="what it runs on")

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if (self.epochs is None) == (self.samples is None):
            raise ValueError("give exactly one of epochs and samples")
        if self.batch_size % self.cluster.num_workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of cluster.num_workers {self.cluster.num_workers}"
            )
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


class GlyphsConfig(Config):
    """Characters drawn from the fonts that matplotlib ships, captioned with their Unicode names."""

    kind: Literal["glyphs"] = Field("glyphs", description="where the pairs come from")
    size: int = Field(36, ge=16, le=512, description="side of a picture in pixels; some more than the model's crop")
    letter_renders: int = Field(5, gt=0, description="training pictures of each Latin, Greek or Cyrillic letter a face")
    symbol_renders: int = Field(1, ge=0, description="training pictures of each other character a face")
    eval_renders: int = Field(1, gt=0, description="pictures of each class a face in the two evaluation splits")
    plain_share: float = Field(0.9, ge=0, le=1, description="share of training captions that are the bare name")
    print_share: float = Field(0.9, ge=0, le=1, description="share of pictures in black on white; others in colours")
    seed: int = Field(0, ge=0, description="gives every picture and caption, each by its place in the split")


class EmojiConfig(Config):
    """Emoji of several artists, from the npm packages emoji-datasource-ARTIST."""

    kind: Literal["emoji"] = Field("emoji", description="where the pairs come from")
    artists: tuple[str, ...] = Field(("google", "twitter", "facebook"), min_length=1, description="whose drawings")
    held_out: str | None = Field("facebook", description="artist kept out of training, in a split of their own")
    version: str = Field("16.0.0", description="version of the npm packages")
    skin_tones: bool = Field(False, description="also the variants of skin tone, with the tone in words")
    plain_share: float = Field(0.5, ge=0, le=1, description="share of training captions that are the bare name")
    seed: int = Field(0, ge=0, description="gives every training picture its caption")

    @model_validator(mode="after")
    def _check(self) -> "EmojiConfig":
        if self.held_out is not None and (self.held_out not in self.artists or len(self.artists) < 2):
            raise ValueError(f"held_out '{self.held_out}' must be one of at least two artists: {list(self.artists)}")
        return self


class FolderConfig(Config):
    """A folder of pictures, each with its caption beside it."""

    kind: Literal["folder"] = Field("folder", description="where the pairs come from")
    path: str = Field(description="the folder; folders within it are searched too")
    caption_key: str = Field("caption", description="key of the caption in NAME.json, read where there is no NAME.txt")
    held_out_share: float = Field(0.0, ge=0, lt=1, description="share of the pictures that goes into split held_out")


class TableConfig(Config):
    """A CSV or TSV file that names pictures and their captions."""

    kind: Literal["table"] = Field("table", description="where the pairs come from")
    path: str = Field(description="the table; paths in it are relative to its folder")
    image_column: str | None = Field(None, description="column of the picture's path; None takes 'filepath' or its kin")
    caption_column: str | None = Field(None, description="column of the caption; None takes 'title' or its kin")
    separator: str | None = Field(None, min_length=1, max_length=1, description="None: a tab where the header has one")
    held_out_share: float = Field(0.0, ge=0, lt=1, description="share of the pictures that goes into split held_out")


SourceConfig = Annotated[GlyphsConfig | EmojiConfig | FolderConfig | TableConfig, Field(discriminator="kind")]


class IngestConfig(Config):
    """python -m jobs.ingest"""

    source: SourceConfig = Field(description="where pictures and captions come from")
    output: str = Field(description="folder of the data set; each split becomes a folder in it")
    shard_samples: int = Field(1000, gt=0, description="samples a tar shard")
    chunk_samples: int = Field(64, gt=0, description="neighbouring samples that one read fetches")
    shorter_side: int | None = Field(None, gt=0, description="shrink pictures to this; None, and smaller ones, as is")
    image_format: Literal["keep", "jpg", "png", "webp"] = Field(
        "keep", description="keep: the file as it is where training can read it, otherwise png"
    )
    quality: int = Field(95, ge=1, le=100, description="of jpg and webp that are encoded anew")
    seed: int = Field(0, ge=0, description="of the order in which samples are written")
    max_bad_fraction: float = Field(0.1, ge=0, le=1, description="share of unusable pairs that stops the run")


class IndexConfig(Config):
    """python -m jobs.index"""

    path: str = Field(description="folder of tar shards in the WebDataset layout")
    chunk_samples: int = Field(64, gt=0, description="neighbouring samples that one read fetches")


class WorkersConfig(Config):
    """What a job of many independent parts takes of the cluster."""

    num_workers: int = Field(1, gt=0, description="processes, each with a copy of the model")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores of each; as many threads decode beside the model")
    use_gpu: bool = Field(False, description="one GPU for each")


class EmbedConfig(Config):
    """python -m jobs.embed"""

    model: str = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint or exported weights")
    data: str = Field(description="folder of a data set: tar shards and their manifest.parquet")
    output: str = Field(description="folder that the Parquet parts go to; a run that was interrupted goes on in it")
    what: Literal["pictures", "texts", "both"] = Field("both", description="what is embedded")
    batch_size: int = Field(256, gt=0, description="pictures, and texts, encoded at once")
    part_samples: int = Field(4096, gt=0, description="samples a part, rounded to whole chunks")
    cluster: WorkersConfig = Field(WorkersConfig(), description="what it runs on")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of samples with an error that stops the run")
    tracking_uri: str | None = Field(None, description="MLflow of models:/..., or None for ./mlflow/mlflow.db")


class ClassifyConfig(Config):
    """python -m jobs.classify"""

    model: str = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint or exported weights")
    data: str | None = Field(None, description="folder of a data set; this or embeddings")
    embeddings: str | None = Field(None, description="output of jobs.embed by the same model, in place of data")
    output: str = Field(description="folder that the Parquet parts go to; a run that was interrupted goes on in it")
    labels: str | tuple[str, ...] = Field(description="the labels, or the path of a file with one a line")
    templates: str | tuple[str, ...] = Field("plain", description="a named template set, or templates with one {}")
    top_k: int = Field(5, gt=0, description="best labels kept for each picture, where there are that many")
    batch_size: int = Field(256, gt=0, description="pictures encoded at once")
    part_samples: int = Field(4096, gt=0, description="samples a part, rounded to whole chunks; embeddings keep theirs")
    cluster: WorkersConfig = Field(WorkersConfig(), description="what it runs on")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of samples with an error that stops the run")
    tracking_uri: str | None = Field(None, description="MLflow of models:/..., or None for ./mlflow/mlflow.db")

    @model_validator(mode="after")
    def _check(self) -> "ClassifyConfig":
        if (self.data is None) == (self.embeddings is None):
            raise ValueError("give exactly one of data and embeddings")
        return self


class ConvertConfig(Config):
    """python -m jobs.convert"""

    input: str = Field(description="a checkpoint, exported weights (a folder or a file), or models:/NAME@ALIAS")
    output: str = Field(description="folder that is written; it must not exist")
    format: Literal["rayclip", "open_clip", "huggingface"] = Field("rayclip", description="what is written")
    model: str | None = Field(
        None, description="preset that a bare state dict is of; None tells by its shapes, and takes GELU"
    )
    tracking_uri: str | None = Field(None, description="MLflow of models:/..., or None for ./mlflow/mlflow.db")


class BenchmarkConfig(Config):
    """python -m jobs.benchmark"""

    name: Literal["tokenizer", "text_tower", "step", "loss", "serve", "batching"] = Field(
        description="what is measured"
    )
    repeats: int = Field(5, gt=0, description="counted runs of each side, in turn, after a warm-up")
    samples: int = Field(20_000, gt=0, description="captions to tokenise")
    threads: int | None = Field(None, gt=0, description="torch threads; None leaves torch's own choice")
    preset: str = Field("ViT-B/32", description="the model of a step")
    batch_size: int = Field(32, gt=0, description="pairs a step")
    micro_batch_size: int | None = Field(None, gt=0, description="pairs in the towers at once in a step; None: all")
    precision: Precision = Field("float32", description="of both sides' towers in a step")
    compile: bool = Field(False, description="torch.compile on both sides of a step: token-wise parts, open_clip whole")
    window_s: float = Field(8.0, gt=0, description="length of a window under load")
    cases: tuple[Literal["ViT-B/32", "small"], ...] = Field(("ViT-B/32", "small"), description="models to serve")
    model: str | None = Field(None, description="a checkpoint as the small model; none: the demo's shape")
    settings: tuple[str, ...] = Field((), description="key=value for the service that is measured")


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
