"""What a search decides: which settings come next, and whether a trial goes on.

Both follow from the sweep's own journal, a line of JSON for each decision. A sweep that starts anew replays it, and is
where it was: trials that were stopped stay so, and every comparison is made with the same results. Ray Tune's own
state could not be used for that: it is written now and then, and names trials by random numbers.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from rayclip.config import Choices, Range, SearchPlan
from rayclip.io.files import write_text
from rayclip.io.paths import StoragePath, append
from rayclip.orchestration.cluster.ray_internals import enter_bracket
from rayclip.scaling.search import Values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Entry = dict[str, Any]


class Journal:
    """Decisions of a sweep in their order."""

    def __init__(self, path: StoragePath) -> None:
        self._path = path
        self.entries: list[Entry] = list(_read(path))
        if path.is_file():  # a crash may have cut the last line off
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, **entry: Any) -> None:
        """Append a decision."""
        self.entries.append(entry)
        append(self._path, (json.dumps(entry) + "\n").encode())

    def values(self, trial: str) -> Values | None:
        """The settings that a trial was given; None where it was given none yet."""
        return next((entry["values"] for entry in self.entries if entry["trial"] == trial and "values" in entry), None)

    def stopped_at(self, trial: str) -> Entry | None:
        """The result that a trial was stopped at; None for one that was not."""
        return next(
            (entry for entry in self.entries if entry["trial"] == trial and not entry.get("goes_on", True)), None
        )


class InFolder:
    """Base of objects that Ray Tune keeps nothing of: their state is in the sweep's folder."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: there is no state to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: there is no state to restore."""


class Asha(InFolder, ASHAScheduler):
    """Ray's, with results and decisions in the journal. Trials are known by their names, which last."""

    def __init__(self, journal: Journal, metric: str, plan: SearchPlan, total_samples: int) -> None:
        super().__init__(
            time_attr="samples_seen",
            metric=plan.stop_by or metric,
            mode=plan.mode,
            max_t=total_samples,
            grace_period=plan.grace_samples or total_samples,
            reduction_factor=plan.reduction_factor,
            stop_last_trials=False,
        )
        self._journal, self._metric = journal, metric
        for entry in journal.entries:
            if "value" in entry:
                result = {"samples_seen": entry["samples_seen"], self._metric: entry["value"]}
                enter_bracket(self, entry["trial"])
                super().on_trial_result(None, _Named(entry["trial"]), result)  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Compare a trial that is about to begin with all others."""
        enter_bracket(self, _name(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return Ray Tune's word for whether the trial goes on after this result."""
        if self._metric not in result:
            return TrialScheduler.CONTINUE
        named: Any = _Named(_name(trial))
        decision = super().on_trial_result(tune_controller, named, result)
        goes_on = decision == TrialScheduler.CONTINUE or "finished" in result
        self._journal.add(
            trial=_name(trial),
            samples_seen=result["samples_seen"],
            value=result[self._metric],
            metric=result[self._metric],
            goes_on=goes_on,
        )
        return decision if not goes_on else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its last result has been heard."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """It is left out of nothing: what it gave still counts."""


class _Named(NamedTuple):
    """All that ASHA asks of a trial."""

    trial_id: str


def suggest(plan: SearchPlan, index: int, known: list[tuple[Values, float]]) -> Values:
    """TPE's values for the trial of that number, from what is known: a function of these alone."""
    import optuna  # an extra: nothing but TPE needs it
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = OptunaSearch(
        space={key: _distribution(span) for key, span in plan.space.items()},
        metric="value",
        mode=plan.mode,
        points_to_evaluate=[_encoded(plan, values) for values, _ in known] or None,
        evaluated_rewards=[value for _, value in known] or None,
        sampler=optuna.samplers.TPESampler(seed=plan.seed * 1_000_003 + index),
    )
    values: Values = search.suggest(str(index)) or {}
    return {key: _decoded(plan.space[key], value) for key, value in values.items()}


def _distribution(span: Range | Choices) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(span, Choices):
        return CategoricalDistribution(range(len(span.choices)))
    if isinstance(span.low, int) and isinstance(span.high, int):
        return IntDistribution(span.low, span.high, log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def _encoded(plan: SearchPlan, values: Values) -> Values:
    """Choices by their place: Optuna takes plain numbers and names only."""
    return {
        key: list(span.choices).index(values[key]) if isinstance(span, Choices) else values[key]
        for key, span in plan.space.items()
    }


def _decoded(span: Range | Choices, value: Any) -> Any:
    return span.choices[value] if isinstance(span, Choices) else value


def _name(trial: Any) -> str:
    return trial.config["task"].name


def _read(path: StoragePath) -> Iterator[Entry]:
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return
