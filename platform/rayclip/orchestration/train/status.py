"""The actor between those that train and those that show it. It imports nothing of the library: it is soon there."""

import asyncio
from typing import Any

import ray


@ray.remote(num_cpus=0)
class RunStatusActor:
    """What the first worker last said of itself, for the driver to show; and what outlives a process that validates."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._notes: list[str] = []
        self._evaluations: list[dict[str, float]] = []
        self._continued: set[int] = set()
        self._has_ended = False
        self._changed = asyncio.Condition()
        self._attempts: dict[int, int] = {}
        self._error: str | None = None
        self._failures: dict[int, tuple[str, int]] = {}

    def update(self, state: dict[str, Any]) -> bool:
        """Replace the state; returns whether the run is to save and stop."""
        self._state = state
        return self._has_ended

    def note(self, text: str) -> None:
        """Keep a line for people, which is shown once."""
        self._notes.append(text)

    def add_evaluation(self, evaluation: dict[str, float]) -> None:
        """Keep what an evaluation gave, `samples_seen` among it, for the driver to decide on."""
        self._evaluations.append(evaluation)

    async def go_on(self, samples_seen: int) -> None:
        """Let the run go on after the evaluation there."""
        async with self._changed:
            self._continued.add(samples_seen)
            self._changed.notify_all()

    async def end(self) -> None:
        """Let the run end at the evaluation that it waits at, or else save and end within a few steps."""
        async with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    async def goes_on(self, samples_seen: int) -> bool:
        """Whether the run goes on after the evaluation there; returns once that is decided."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_ended or samples_seen in self._continued)
        return samples_seen in self._continued

    def attempt(self, samples_seen: int) -> int:
        """Count the attempts to validate the checkpoint there: this is the first, the second, ..."""
        self._attempts[samples_seen] = self._attempts.get(samples_seen, 0) + 1
        return self._attempts[samples_seen]

    def add_failure(self, rank: int, failure: str, samples_seen: int) -> None:
        """Keep how a worker failed, or stop the run where its last failure was the same, at the same place."""
        if self._failures.get(rank) == (failure, samples_seen):
            self._error = (
                f"training failed twice in the same way at {samples_seen:,} samples seen, and was not tried again: "
                f"{failure}"
            )
        self._failures[rank] = failure, samples_seen

    def stop(self, error: str) -> None:
        """Keep the reason for which the run has ended, and which a restart would meet again."""
        self._error = error

    def state(self) -> dict[str, Any]:
        """Return the state, and the notes and evaluations since the last call."""
        notes, self._notes = self._notes, []
        evaluations, self._evaluations = self._evaluations, []
        return self._state | {"notes": notes, "evaluations": evaluations}

    def error(self) -> str | None:
        """Why the run was stopped, if it was."""
        return self._error
