"""Settings of benchmarks."""

from typing import Annotated, Literal

from pydantic import Field

from rayclip.config.base import Config, InputModel, InputPath, RenamedFrom
from rayclip.config.training import Precision


class BenchmarkConfig(Config):
    """python -m benchmarks"""

    name: Literal[
        "tokenizer",
        "text_tower",
        "step",
        "loss",
        "serve",
        "batching",
        "linear_probe",
        "features",
        "loader",
        "fast_path",
        "ledger",
        "curation",
        "coverage",
        "storage",
        "pause",
        "stream",
        "start",
    ] = Field(description="what is measured")
    repeats: int = Field(5, gt=0, description="counted runs of each side, in turn, after a warm-up")
    samples: int = Field(20_000, gt=0, description="captions to tokenise, pictures to extract, pairs to train on")
    probe_samples: int = Field(10_000, ge=1000, description="samples that a linear probe is fitted on")
    draws: int = Field(300, gt=0, description="sets of made-up runs for each share of intervals that cover")
    threads: int | None = Field(None, gt=0, description="torch threads; None leaves torch's own choice")
    preset: str = Field("ViT-B/32", description="the model of a step")
    batch_size: int = Field(32, gt=0, description="pairs a step")
    micro_batch_size: int | None = Field(None, gt=0, description="pairs in the towers at once in a step; None: all")
    precision: Precision = Field("float32", description="of both sides' towers in a step")
    compile: bool = Field(False, description="torch.compile on both sides of a step: token-wise parts, open_clip whole")
    images: Annotated[int, RenamedFrom("pictures")] = Field(512, gt=0, description="of each size that are loaded")
    pairs: int = Field(400_000_000, gt=1_000_000, description="in the data set of a ledger")
    chunks: int = Field(10_000, gt=1_000, description="of the smallest manifest streamed; also 10 and 100 times")
    corpus_pairs: int = Field(200_000, gt=100, description="that are curated")
    samples_per_s: float = Field(2_000.0, gt=0, description="of one GPU: how many cores would feed it is told")
    window_s: float = Field(8.0, gt=0, description="length of a window under load")
    cases: tuple[Literal["ViT-B/32", "small", "core", "s3", "ray"], ...] = Field(
        (), description="parts of a benchmark: models to serve; core, s3 and ray of the loader; empty: all"
    )
    model: InputModel | None = Field(None, description="a checkpoint as the small model; none: the demo's shape")
    workers: int = Field(2, gt=0, description="processes with a core each that extract features, or train")
    checkout: InputPath | None = Field(
        None, description="another version's folder, whose start is measured in turn with ours"
    )
    settings: tuple[str, ...] = Field((), description="key=value for the service that is measured")
