"""Every job's settings: pydantic, frozen, unknown keys refused, each key described once, here."""

from rayclip.config.base import Config
from rayclip.config.benchmark import BenchmarkConfig
from rayclip.config.data import (
    DataConfig,
    EmojiConfig,
    FolderConfig,
    GlyphsConfig,
    IndexConfig,
    IngestConfig,
    SourceConfig,
    TableConfig,
)
from rayclip.config.evaluation import EvaluationConfig, RetrievalTask, Task, ZeroShotTask
from rayclip.config.model import ModelConfig, ResNetConfig, TextConfig, VisionConfig
from rayclip.config.offline import ClassifyConfig, ConvertConfig, EmbedConfig, WorkersConfig
from rayclip.config.scaling import FitConfig, Frontier, LawForm, PlanConfig
from rayclip.config.training import (
    CheckpointConfig,
    ClusterConfig,
    EmaConfig,
    GuardConfig,
    LossConfig,
    OptimizerConfig,
    Precision,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "BenchmarkConfig",
    "CheckpointConfig",
    "ClassifyConfig",
    "ClusterConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "EmaConfig",
    "EmbedConfig",
    "EmojiConfig",
    "EvaluationConfig",
    "FitConfig",
    "FolderConfig",
    "Frontier",
    "GlyphsConfig",
    "GuardConfig",
    "IndexConfig",
    "IngestConfig",
    "LawForm",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "Precision",
    "ResNetConfig",
    "RetrievalTask",
    "SourceConfig",
    "TableConfig",
    "Task",
    "TextConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisionConfig",
    "WorkersConfig",
    "ZeroShotTask",
]
