"""A run's workers, followed from the driver: they train in the background, and say in an actor how far they are."""

import threading
from collections.abc import Generator
from concurrent.futures import Future, wait
from typing import Any

import ray

from rayclip.io.lease import Lease
from rayclip.orchestration.cluster.progress import Line
from rayclip.orchestration.cluster.ray_trainer import StreamTrainer
from rayclip.orchestration.cluster.signals import Received

_POLL_S = 0.5

Evaluation = dict[str, float]
"""What an evaluation gave: `samples_seen` and each TASK.METRIC."""


def start_fit(trainer: StreamTrainer) -> "Future[None]":
    """Begin to train in a thread of its own; the result says how it ended."""
    fit: Future[None] = Future()

    def run() -> None:
        try:
            trainer.fit()
            fit.set_result(None)
        except BaseException as error:
            fit.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # an executor's would keep an interrupted process waiting
    return fit


def follow(
    status_actor: Any, line: Line, fit: "Future[None]", lease: Lease, received: Received
) -> Generator[Evaluation | None, None, None]:
    """Show how far the workers are, until they have ended; let them save and end once a signal has come."""
    last: dict[str, Any] = {}
    finished = is_ending = False
    while not finished:
        finished = bool(wait([fit], _POLL_S).done)  # one more look after the end
        lease.check()
        if received.number is not None and not is_ending:
            is_ending = True
            line.note("stopping: a checkpoint of this step is being saved; once more stops at once")
            ray.get(status_actor.end.remote())
        state = ray.get(status_actor.state.remote())
        for note in state.pop("notes"):
            line.note(note)
        evaluations = state.pop("evaluations")
        if state and state != last:
            shown = {"loss": f"{state['loss']:.3f}", "data wait": f"{state['data_wait_share']:.0%}"}
            line.update(state["samples_seen"], state["samples_per_s"], **shown)
            last = state
        yield None
        for evaluation in evaluations:
            yield evaluation
            ray.get(status_actor.go_on.remote(int(evaluation["samples_seen"])))
