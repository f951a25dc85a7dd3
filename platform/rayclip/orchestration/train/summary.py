"""The end of a run: its best checkpoint is registered, and what it came to is summed up."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rayclip.config import ModelConfig, TrainConfig
from rayclip.evaluation.tasks import Evaluator
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.tracking import mlflow as tracking
from rayclip.tracking.promotion import Measured, promote
from rayclip.tracking.registry import link_checkpoint, register
from rayclip.training.checkpoint import read_state


def sum_up(config: TrainConfig, folder: RunFolder, uri: str, run_id: str, num_samples: int) -> dict[str, Any]:
    """Register the best checkpoint and sum the run up; it was of `num_samples` different ones.

    A branch counts all samples that its weights have seen, and its own time.
    """
    evaluated = [(path, metrics) for path, metrics in folder.evaluated_checkpoints() if metrics["measured"]]
    best, metrics = max(evaluated, key=lambda pair: (pair[1]["score"], pair[0].name))
    state, best_state = read_state(evaluated[-1][0]), read_state(best)
    trained = state.samples_seen - state.branched_at
    decision = None
    if config.tracking.register_as:
        client = tracking.connect(uri)
        model = link_checkpoint(client, run_id, best, best_state.samples_seen, metrics["tasks"])
        by_average = ".ema." in (config.evaluation.best or "")
        version = register(client, model, best, config.tracking.register_as, by_average)
        measured = _measured(config, metrics["tasks"])
        decision = promote(client, config.tracking, version, measured, _compared_by(config))
    by_kind: dict[str, dict[str, Any]] = {}
    for name, task in config.evaluation.tasks.items():
        if name in metrics["tasks"]:
            by_kind.setdefault(task.kind, {})[name] = metrics["tasks"][name]
    return {
        "name": config.name,
        **by_kind,
        "samples_seen": state.samples_seen,
        "samples_trained": trained,
        "unique_samples": min(state.samples_seen, num_samples),
        "steps": state.steps,
        "device": state.device,
        "train_time_s": round(state.train_time_s, 1),
        "samples_per_s": round(trained / max(state.train_time_s, 1e-9), 1),
        "data_wait_share": round(state.data_wait_s / max(state.train_time_s, 1e-9), 4),
        "skipped": state.skipped,
        "checkpoint": str(best),
        "checkpoint_samples_seen": best_state.samples_seen,
        "mlflow_run_id": run_id,
        "registered_model": config.tracking.register_as,
        "model_version": decision and decision.version,
        "promotion": decision and asdict(decision),
        "manifest_digest": state.manifest_digest,
        "code_version": state.code_version,
    }


def _measured(config: TrainConfig, tasks: Mapping[str, Any]) -> dict[str, Measured]:
    assert isinstance(config.model, ModelConfig)
    evaluator = Evaluator(config.evaluation.tasks, config.model.vision.image_size, config.evaluation.batch_size)
    digests = evaluator.digests()
    return {name: Measured(digests[name], metrics) for name, metrics in tasks.items()}


def _compared_by(config: TrainConfig) -> str | None:
    """The metric that versions are compared by: TASK.METRIC."""
    if config.evaluation.best is not None:
        return config.evaluation.best
    return next((f"{name}.{task.metrics[0]}" for name, task in config.evaluation.tasks.items()), None)
