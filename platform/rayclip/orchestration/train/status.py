"""Actors between those that train and those that show it. They import nothing of the library: they are soon there."""

from typing import Any

import ray


@ray.remote(num_cpus=0)
class RunStatusActor:
    """What the first worker last said of itself, for the driver to show; and what outlives a process that measures."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._notes: list[str] = []
        self._evaluations: list[dict[str, float]] = []
        self._decisions: dict[int, bool] = {}
        self._attempts: dict[int, int] = {}
        self._error: str | None = None

    def update(self, state: dict[str, Any]) -> None:
        """Replace the state."""
        self._state = state

    def note(self, text: str) -> None:
        """Something to tell once."""
        self._notes.append(text)

    def add_evaluation(self, evaluations: dict[str, float]) -> None:
        """What an evaluation gave, `samples_seen` among it."""
        self._evaluations.append(evaluations)

    def decide(self, samples_seen: int, goes_on: bool) -> None:
        """Say whether the run goes on after the evaluation there."""
        self._decisions[samples_seen] = goes_on

    def decision(self, samples_seen: int) -> bool | None:
        """What was said of the evaluation there; None before it was."""
        return self._decisions.get(samples_seen)

    def attempt(self, samples_seen: int) -> int:
        """Count the attempts to measure the checkpoint there: this is the first, the second, ..."""
        self._attempts[samples_seen] = self._attempts.get(samples_seen, 0) + 1
        return self._attempts[samples_seen]

    def stopped(self) -> bool:
        """Whether it was said that the run does not go on."""
        return not all(self._decisions.values())

    def stop(self, error: str) -> None:
        """The run has ended for a reason that a restart would meet again."""
        self._error = error

    def state(self) -> dict[str, Any]:
        """The state, and the notes and evaluations since the last call."""
        notes, self._notes = self._notes, []
        evaluations, self._evaluations = self._evaluations, []
        return self._state | {"notes": notes, "measured": evaluations}

    def error(self) -> str | None:
        """Why the run was stopped, if it was."""
        return self._error


@ray.remote(num_cpus=0)
class SweepStatusActor:
    """Where trials say how far they are, for the driver to show."""

    def __init__(self) -> None:
        self._news: dict[str, dict[str, Any]] = {}

    def tell(self, name: str, **news: Any) -> None:
        """Something new of a trial."""
        self._news.setdefault(name, {}).update(news)

    def take(self) -> dict[str, dict[str, Any]]:
        """What was told since the last call, by trial."""
        news, self._news = self._news, {}
        return news
