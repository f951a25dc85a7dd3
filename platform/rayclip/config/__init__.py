"""Every job's settings: pydantic, frozen, unknown keys refused, each key described once, here."""

from rayclip.config.base import Config
from rayclip.config.benchmark import BenchmarkConfig
from rayclip.config.data import (
    DataConfig,
    DigitsConfig,
    EmojiConfig,
    FolderConfig,
    GlyphsConfig,
    IndexConfig,
    IngestConfig,
    SentimentConfig,
    ShapesConfig,
    SourceConfig,
    TableConfig,
)
from rayclip.config.evaluation import (
    CompareConfig,
    DataSetConfig,
    EvaluationConfig,
    RetrievalTask,
    SuiteConfig,
    Task,
    ZeroShotTask,
)
from rayclip.config.model import ModelConfig, ResNetConfig, TextConfig, VisionConfig
from rayclip.config.offline import ClassifyConfig, ConvertConfig, EmbedConfig, WorkersConfig
from rayclip.config.scaling import FitConfig, Frontier, LawForm
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
    "CompareConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DataSetConfig",
    "DigitsConfig",
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
    "Precision",
    "ResNetConfig",
    "RetrievalTask",
    "SentimentConfig",
    "ShapesConfig",
    "SourceConfig",
    "SuiteConfig",
    "TableConfig",
    "Task",
    "TextConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisionConfig",
    "WorkersConfig",
    "ZeroShotTask",
]
