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
from rayclip.config.scaling import (
    Choices,
    FitConfig,
    Frontier,
    LadderConfig,
    LadderPlan,
    LawForm,
    Range,
    SearchPlan,
    SweepConfig,
)
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
    "Choices",
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
    "LadderConfig",
    "LadderPlan",
    "LawForm",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "Range",
    "ResNetConfig",
    "RetrievalTask",
    "SearchPlan",
    "SourceConfig",
    "SweepConfig",
    "TableConfig",
    "Task",
    "TextConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisionConfig",
    "WorkersConfig",
    "ZeroShotTask",
]
