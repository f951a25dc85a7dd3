"""Measuring a model in the course of its training, on the workers or beside them: the same for both, to the bit."""

from pathlib import Path
from typing import Any

from rayclip.config import ModelConfig, TrainConfig
from rayclip.data.tokenizer import get_tokenizer
from rayclip.evaluation.tasks import Evaluator
from rayclip.inference.encoder import Encoder
from rayclip.models.clip import CLIP
from rayclip.tracking.names import flatten
from rayclip.training.loop import Metrics

_SHOWN = ("top1", "top5", "image_to_text.recall_at_1", "image_to_text.recall_at_5")


def evaluate_model(config: TrainConfig, model: CLIP, contact_sheets: Path | None = None) -> Metrics:
    """What the run's tasks give, by task, on the model's device; contact sheets go to `contact_sheets`.

    Workers of one process group call this together.
    """
    assert isinstance(config.model, ModelConfig)
    encoder = Encoder(model, get_tokenizer(config.model.text.context_length), model.logit_scale.device)
    settings = config.evaluation
    return Evaluator(settings.tasks, config.model.vision.image_size, settings.batch_size).run(encoder, contact_sheets)


def with_ema(metrics: Metrics, averaged: Metrics) -> Metrics:
    """Return the metrics of the weights with those of their moving average under `ema`."""
    return {name: {**measured, "ema": averaged[name]} for name, measured in metrics.items()}


def checkpoint_metrics(config: TrainConfig, samples_seen: int, metrics: Metrics) -> dict[str, Any]:
    """What a checkpoint's metrics.json holds, where `metrics` were measured; nothing, where they were not.

    The score is what checkpoints are compared by: the metric that `evaluation.best` names, else how late they are.
    """
    best = config.evaluation.best
    measured = bool(metrics) or not config.evaluation.tasks
    # -1 where nothing was measured: below all that is.
    score = float(samples_seen) if best is None else float(flatten(metrics).get(best, -1.0))
    return {"measured": measured, "score": score, "tasks": metrics}


def mlflow_metrics(metrics: Metrics) -> dict[str, float]:
    """Return the points that MLflow's run is given of it; what is the same at each evaluation is in `constants`."""
    return {f"evaluation/{key}": value for key, value in flatten(metrics).items() if not _is_constant(key)}


def constants(metrics: Metrics) -> dict[str, float]:
    """Return what evaluations always give the same of: sizes of the data, and what chance would give."""
    named = {key: value for key, value in flatten(metrics).items() if _is_constant(key) and ".ema." not in key}
    return {f"evaluation/{key}": value for key, value in named.items()}


def _is_constant(key: str) -> bool:
    return key.rpartition(".")[2].startswith(("num_", "chance_"))


def format_metrics(samples_seen: int, metrics: Metrics) -> str:
    """Return the line that people are shown of an evaluation."""
    shown = [
        f"{name} {key} {value:.1%}"
        for name, measured in metrics.items()
        for key, value in flatten(measured).items()
        if key.removeprefix("ema.") in _SHOWN
    ]
    return f"at {samples_seen:,} samples: {', '.join(shown)}"
