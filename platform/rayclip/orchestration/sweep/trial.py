"""One trial of a sweep, as Ray Tune's actor: runs of training, one after another, with this process as their driver.

Training runs on a thread of its own. At each evaluation it waits in `should_continue` until Tune, which has got the
result from `step`, asks for the next one, and so decides that it goes on. Where Tune stops the trial, the run ends at
its evaluation, its workers and their placement group with it; killing this process would leave both behind.
"""

import threading
import time
import traceback
from dataclasses import dataclass
from queue import Queue
from typing import Any

import ray.tune
from ray.actor import ActorHandle

from rayclip.config import TrainConfig
from rayclip.errors import UserError
from rayclip.io.paths import append, storage_path
from rayclip.orchestration.sweep.table import TRAINING
from rayclip.orchestration.train.driver import CrashedError, run_training
from rayclip.orchestration.train.run_context import StoppedError
from rayclip.tracking.mlflow import flatten


@dataclass(frozen=True)
class TrialTask:
    """What a trial does: `starts` are the samples that each run takes over from the one it branches off."""

    name: str
    runs: tuple[TrainConfig, ...]
    starts: tuple[int, ...]
    awaits_decision: bool
    status_actor: ActorHandle

    def log(self, text: str) -> None:
        """A line in the trial's own log, in the sweep's folder."""
        path = storage_path(self.runs[0].runs) / "logs" / f"{self.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, f"{time.strftime('%H:%M:%S')} {text}\n".encode())


class SweepStatusLine:
    """Puts a run's progress on the board; `before` are the samples that the trial trained in earlier runs."""

    def __init__(self, task: TrialTask, before: int) -> None:
        self._task, self._before = task, before

    def update(self, done: int, rate: float | None = None, **shown: str) -> None:
        """Tell the board."""
        news = {"samples": self._before + done, "rate": rate or 0.0, "loss": shown.get("loss", "")}
        self._task.status_actor.tell.remote(self._task.name, state=TRAINING, **news)

    def note(self, text: str) -> None:
        """A line in the trial's log."""
        self._task.log(text)

    def close(self) -> None:
        """Nothing is left standing."""


class TrialActor(ray.tune.Trainable):
    """Results are `samples_seen` and each TASK.METRIC of an evaluation; `finished` names a run that has ended. The last
    one is `done`, with `failed` where a mistake ended the trial that another try would meet again.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begin to train."""
        self._task: TrialTask = config["task"]
        self._results: Queue[dict[str, Any] | BaseException] = Queue()
        self._decisions: Queue[bool] = Queue()
        self._is_asked = False
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """Wait for the next result. Raises what ended the training."""
        if self._is_asked:
            self._decisions.put(True)
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        self._is_asked = result.pop("asks", False)
        return result

    def cleanup(self) -> None:
        """End the run that waits to hear if it goes on."""
        self._decisions.put(False)
        self._thread.join()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process: it has everything imported."""
        self.cleanup()
        self.setup(new_config)
        return True

    def _train(self) -> None:
        before = 0
        try:
            for config, start in zip(self._task.runs, self._task.starts, strict=True):
                before += self._run(config, before - start) - start
            self._results.put({"done": True})
        except StoppedError:
            pass
        except CrashedError as error:
            self._results.put(error)
        except UserError as error:
            self._results.put({"done": True, "failed": str(error)})
        except BaseException as error:
            self._task.log(traceback.format_exc())  # the sweep shows a line of it
            self._results.put(error)

    def _run(self, config: TrainConfig, before: int) -> int:
        """Train one run and put what it came to; returns the samples it has seen."""

        def new_line(total: int, start: int = 0) -> SweepStatusLine:
            return SweepStatusLine(self._task, before)

        summary = run_training(config, new_line, self._should_continue if self._task.awaits_decision else None)
        measured = flatten(summary.get("zero_shot", {})) | flatten(summary.get("retrieval", {}))
        samples: int = summary["samples_seen"]
        self._task.status_actor.tell.remote(self._task.name, samples=before + samples)
        self._results.put({"finished": config.name, "samples_seen": samples, **measured})
        return samples

    def _should_continue(self, measured: dict[str, float]) -> bool:
        self._results.put({**measured, "asks": True})
        return self._decisions.get()
