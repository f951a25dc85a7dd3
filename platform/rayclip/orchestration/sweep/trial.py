"""One trial of a sweep, as Ray Tune's actor: runs of training, one after another, with this process as their driver.

Each `step` trains up to the next news. Where that is an evaluation, the workers wait until Tune, which has got it, asks
for the next step and so decides that the trial goes on; where Tune stops the trial instead, the run ends at its
evaluation, its workers and their placement group with it. Killing this process would leave the placement group behind:
Ray's own cleaner of these asks the dashboard, which a Ray on one machine is started without.
"""

import time
import traceback
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import ray.tune

from rayclip.config import TrainConfig
from rayclip.errors import CrashedError, UserError
from rayclip.io.paths import append, storage_path
from rayclip.orchestration.sweep.table import TRAINING
from rayclip.orchestration.train.driver import start_training
from rayclip.tracking.names import flatten


@dataclass(frozen=True)
class TrialTask:
    """What a trial does: `starts` are the samples that each run takes over from the one it branches off."""

    name: str
    runs: tuple[TrainConfig, ...]
    starts: tuple[int, ...]
    awaits_decision: bool

    def log(self, text: str) -> None:
        """Add a line to the trial's own log, in the sweep's folder."""
        path = storage_path(self.runs[0].runs) / "logs" / f"{self.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, f"{time.strftime('%H:%M:%S')} {text}\n".encode())


class TrialProgress:
    """Keeps a run's progress for the sweep's table; `before` are the samples that the trial trained in earlier runs."""

    def __init__(self, task: TrialTask, before: int) -> None:
        self._task, self._before = task, before
        self._news: dict[str, Any] = {}

    def update(self, done: int, rate: float | None = None, **shown: str) -> None:
        """Keep how far the run is."""
        samples = {"samples": self._before + done, "rate": rate or 0.0, "loss": shown.get("loss", "")}
        self._news = {"progress": {"state": TRAINING, **samples}}

    def note(self, text: str) -> None:
        """Add a line to the trial's log."""
        self._task.log(text)

    def close(self) -> None:
        """Do nothing: no line of progress is left to end."""

    def take(self) -> dict[str, Any]:
        """Return what is new since the last call, as part of a result."""
        news, self._news = self._news, {}
        return news


class TrialActor(ray.tune.Trainable):
    """Results hold `progress`, for the table, and what an evaluation gave: `samples_seen` and each TASK.METRIC; or
    `finished`, the name of a run that has ended. The last one is `done`, with `failed` where a mistake ended the trial
    that another try would meet again.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the trial of the config's task."""
        self._results = _train(config["task"])

    def step(self) -> dict[str, Any]:
        """Train up to the next result. Raises what ended the training."""
        return next(self._results)

    def cleanup(self) -> None:
        """End the run that waits to hear if it goes on."""
        self._results.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process: it has everything imported."""
        self.cleanup()
        self.setup(new_config)
        return True


def _train(task: TrialTask) -> Generator[dict[str, Any], None, None]:
    before = 0
    try:
        for config, start in zip(task.runs, task.starts, strict=True):
            before += (yield from _run(task, config, before - start)) - start
        yield {"done": True}
    except CrashedError:
        raise
    except UserError as error:
        yield {"done": True, "failed": str(error)}
    except Exception:
        task.log(traceback.format_exc())  # the sweep shows a line of it
        raise


def _run(task: TrialTask, config: TrainConfig, before: int) -> Generator[dict[str, Any], None, int]:
    """Train one run, and yield its results; returns the samples it has seen."""
    line = TrialProgress(task, before)
    with closing(start_training(config, lambda total, start=0: line, task.awaits_decision)) as training:
        while True:
            try:
                evaluation = next(training)
            except StopIteration as ended:
                summary = ended.value
                break
            if news := line.take() | (evaluation or {}):
                yield news
    evaluated = flatten(summary.get("zero_shot", {})) | flatten(summary.get("retrieval", {}))
    samples: int = summary["samples_seen"]
    yield {"finished": config.name, "progress": {"samples": before + samples}, "samples_seen": samples, **evaluated}
    return samples
