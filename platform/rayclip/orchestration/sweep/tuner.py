"""Trials under Ray Tune, which keeps them going; what they are and what becomes of them is the sweep's matter."""

import logging
import os
from typing import TYPE_CHECKING, Any

import ray.tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from rayclip.io.paths import StoragePath
from rayclip.orchestration.cluster.ray_internals import TUNE_ENVIRONMENT
from rayclip.orchestration.cluster.ray_storage import ray_storage
from rayclip.orchestration.cluster.signals import Received
from rayclip.orchestration.sweep.search import InFolder
from rayclip.orchestration.sweep.trial import TrialActor

if TYPE_CHECKING:
    from rayclip.orchestration.sweep.driver import Sweep


def run_trials(
    sweep: "Sweep",
    scheduler: TrialScheduler | None,
    num_trials: int,
    at_once: int,
    max_failures: int,
    folder: StoragePath,
    received: Received,
) -> None:
    """Run so many of the sweep's trials, some at a time, to their ends, or to where a signal comes.

    `folder` is Ray Tune's own.
    """
    os.environ.update(TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's failure is in the table, and in its log
    ray.tune.Tuner(
        # Next to nothing, of a resource that nothing here waits for: all cores stay free for workers.
        ray.tune.with_resources(TrialActor, ray.tune.PlacementGroupFactory([{"memory": 1}])),
        tune_config=ray.tune.TuneConfig(
            search_alg=_Source(sweep),
            scheduler=scheduler,
            num_samples=num_trials,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=ray.tune.RunConfig(
            **ray_storage(folder),
            failure_config=ray.tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # runs keep their own
            callbacks=[_Listener(sweep)],
            stop=_SignalStopper(received),
            verbose=0,
        ),
    ).fit()


class _Source(InFolder, Searcher):
    """Hands Ray Tune the next trial."""

    def __init__(self, sweep: "Sweep") -> None:
        super().__init__()
        self._sweep = sweep

    def suggest(self, trial_id: str) -> Any:
        task = self._sweep.next_task()
        return Searcher.FINISHED if task is None else {"task": task}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass


class _SignalStopper(ray.tune.Stopper):
    """Stops all trials once a signal has come: each saves the step that it is at."""

    def __init__(self, received: Received) -> None:
        self._received = received

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._received.number is not None


class _Listener(InFolder, ray.tune.Callback):
    """Hands on what Ray Tune tells of trials."""

    def __init__(self, sweep: "Sweep") -> None:
        self._sweep = sweep

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._sweep.heard(_name(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._sweep.ended(_name(trial), trial.last_result.get("failed"))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._sweep.restarted(_name(trial), _reason(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._sweep.refresh()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._sweep.ended(_name(trial), _reason(trial))


def _name(trial: Any) -> str:
    return trial.config["task"].name


def _reason(trial: Any) -> str:
    lines = [line for line in str(trial.get_error() or "its process died").splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(trial.get_error()).__name__
