"""Sweeps: many trainings under Ray Tune, for a scaling law or for the best settings.

What has to be done is a function of the config, and what has been done is in the folders of the runs: a sweep that is
started again trains what is missing. Only the decisions of a search are kept beside (search.py).
"""

import os
from typing import Any

import yaml

from rayclip.config import SearchPlan, SweepConfig, TrainConfig
from rayclip.config.base import Effect
from rayclip.config.fields import keys_with, without
from rayclip.config.loader import read_record
from rayclip.errors import Interruption, UserError
from rayclip.io.files import write_text
from rayclip.io.lease import Lease, hold
from rayclip.io.paths import StoragePath, storage_path
from rayclip.orchestration.cluster.connection import check_resources, connect, num_that_fit
from rayclip.orchestration.cluster.progress import note
from rayclip.orchestration.cluster.ray_internals import SWEEP_ENVIRONMENT
from rayclip.orchestration.cluster.resources import resource_request, total
from rayclip.orchestration.cluster.signals import Received, deferred_signals
from rayclip.orchestration.sweep.search import Asha, Journal, suggest
from rayclip.orchestration.sweep.table import FAILED, FINISHED, STARTING, STOPPED, WAITING, SweepTable, TrialLine
from rayclip.orchestration.sweep.trial import TrialTask
from rayclip.orchestration.sweep.trials import Outcomes, Planned, TrialPlanner, with_parent
from rayclip.orchestration.sweep.tuner import run_trials
from rayclip.orchestration.train.plan import resolve
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.scaling.rungs import Row, write_rows
from rayclip.scaling.search import trial_config, trial_name
from rayclip.tracking import mlflow as tracking
from rayclip.tracking.experiment import KIND, log_files
from rayclip.version import code_version


def run_sweep(config: SweepConfig) -> dict[str, Any]:
    """Train what the sweep lacks, and return what all of it came to. Raises UserError for what a user can mend, and
    Interruption where SIGINT or SIGTERM came: the first lets all trials save checkpoints, the second ends at once.

    Trials that fail are named in the summary, and do not keep the others from being trained.
    """
    folder = sweep_folder(config).path
    with hold(folder, f"sweep '{config.name}'", say=note) as lease:
        return _run(Sweep(config, lease), lease)


def _run(sweep: "Sweep", lease: Lease) -> dict[str, Any]:
    succeeded = stopped = False
    try:
        sweep.train()
        lease.fence.check()
        summary = sweep.finish()
        succeeded = not summary["failed"]
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        if not lease.is_lost():  # else it is another's
            tracking.close_run(sweep.uri, sweep.parent_run_id, succeeded, stopped)
    return summary


def sweep_folder(config: SweepConfig) -> RunFolder:
    """Where the sweep keeps its runs, its table and its summary."""
    return RunFolder(storage_path(config.sweeps) / config.name)


class Sweep:
    """The driver's side of a sweep. All is checked as it is made, before anything is started."""

    def __init__(self, config: SweepConfig, lease: Lease) -> None:
        self.config, self._lease = config, lease
        self.search = config.plan if isinstance(config.plan, SearchPlan) else None
        self._received = Received()
        self.folder = sweep_folder(config)
        self.uri = tracking.resolve_uri(config.base.tracking.uri)
        self.journal = Journal(self.folder.path / "journal.jsonl")
        self.planner = TrialPlanner(config, self._base(), self.folder.path, self.journal)
        trials = self.planner.trials()
        for planned in trials:
            planned.check_same()
        self.parent_run_id = self._open_parent()
        self.trials = {planned.name: with_parent(planned, self.parent_run_id) for planned in trials}
        self.lines = {name: planned.line(self.journal, config.metric) for name, planned in self.trials.items()}
        self.outcomes = Outcomes(config.metric, tracking.connect(self.uri))
        self.table = SweepTable(list(self.lines.values()))

    def train(self) -> None:
        """Run all trials that have not ended, as many at a time as there is room for."""
        num_left = sum(line.state == WAITING for line in self.lines.values()) + self._num_to_suggest()
        if not num_left:
            self.table.note(f"sweep '{self.config.name}' is complete already")
            return
        at_once = self._connect()
        self.table.note(f"sweep '{self.config.name}': {num_left} trials to train, {at_once} at a time")
        tune, failures = self.folder.path / "tune", self.config.max_failures
        with deferred_signals() as self._received:
            try:
                run_trials(self, self._asha(), num_left, at_once, failures, tune, self._received)
            finally:
                self.table.refresh(at_once=True)
        if self._received.number is not None:
            message = "stopped: trials have saved the step that they were at; the same command goes on from there"
            raise Interruption(self._received.number, message)

    def finish(self) -> dict[str, Any]:
        """Write the table and what the sweep came to, and log both to the parent run; returns the summary."""
        rows, totals = self.write_rows(), self._totals()
        files = [self.rows_path]
        summary = {"name": self.config.name, "kind": self.config.plan.kind, "metric": self.config.metric, **totals}
        summary["failed"] = {line.name: line.reason for line in self.lines.values() if line.state == FAILED}
        if self.search is not None:
            summary |= {"algorithm": self.search.algorithm, "best": self._best(self.search)}
            if summary["best"]:
                files.append(self._write_best(self.trials[summary["best"]["trial"]]))
        summary |= {"mlflow_run_id": self.parent_run_id, "rows": rows}
        log_files(self.uri, self.parent_run_id, totals, files)
        self.folder.write_summary(summary)
        return summary

    @property
    def rows_path(self) -> StoragePath:
        """Path of the table of runs, a CSV."""
        return self.folder.path / ("trials.csv" if self.search else "rungs.csv")

    def write_rows(self) -> list[Row]:
        """Write the table of runs as they are now."""
        lines = self.lines
        rows = [row for name, planned in self.trials.items() for row in planned.rows(lines[name], self.outcomes)]
        write_rows(self.rows_path, rows)
        return rows

    # What Ray Tune asks and tells

    def next_task(self) -> TrialTask | None:
        """The next trial to begin, the dearest first: one that is begun last keeps all waiting. None after all."""
        waiting = [line for line in self.lines.values() if line.state == WAITING]
        name = max(waiting, key=lambda line: line.total * line.cost).name if waiting else self._suggested()
        if name is None:
            return None
        self.table.change(name, state=STARTING)
        planned = self.trials[name]
        awaits_decision = self.search is not None and self.search.algorithm == "asha"
        return TrialTask(name, planned.trial.runs, planned.starts, awaits_decision)

    def heard(self, name: str, result: dict[str, Any]) -> None:
        """A result of a trial."""
        metric = result.get(self.config.metric)
        self.table.change(name, **result.get("progress", {}), **({} if metric is None else {"metric": metric}))
        if "finished" in result:
            self.write_rows()
            text = "" if metric is None else f": {self.config.metric} {metric:.1%}"
            self.table.note(f"{result['finished']} finished at {result['samples_seen']:,} samples{text}")

    def ended(self, name: str, failure: str | None) -> None:
        """A trial has ended: it failed, was stopped or is finished."""
        stopped = self.journal.stopped_at(name)
        if failure is not None:
            self.table.change(name, state=FAILED, reason=failure)
            self.table.note(f"{name} failed: {failure}")
        elif stopped:
            self.table.change(name, state=STOPPED, samples=stopped["samples_seen"])
        elif self._received.number is not None:
            self.table.change(name, state=WAITING)
        else:
            self.table.change(name, state=FINISHED, samples=self.lines[name].total)
        self.write_rows()

    def restarted(self, name: str, reason: str) -> None:
        """A trial's processes died, and it goes on from its checkpoint."""
        self.table.note(f"{name} is begun again where it was: {reason}")
        self.table.change(name, state=STARTING)

    def refresh(self) -> None:
        """Show how far the trials are, where it is time. Raises LostError where another has the sweep's folder now."""
        self._lease.check()
        self.table.refresh()

    # What is done

    def _base(self) -> TrainConfig:
        base = self.config.base
        return resolve(
            base.model_copy(
                update={
                    "tracking": base.tracking.model_copy(update={"uri": self.uri, "register_as": None}),
                    # The last look, where the rate has come down: not the best of several.
                    "evaluation": base.evaluation.model_copy(update={"best": None}),
                }
            )
        )

    def _open_parent(self) -> str:
        settings = self.config.model_dump(mode="json")
        record = self.folder.read_record()
        if record is not None:
            # By today's names, whatever the release that wrote it called them.
            before = read_record(SweepConfig, record["config"], f"the record of the sweep in '{self.folder.path}'")
            if _decided(before.model_dump(mode="json")) != _decided(settings):
                raise UserError(
                    f"'{self.folder.path}' holds a sweep with another plan or metric: give this one another name, "
                    "or remove the folder"
                )
        known = record["mlflow_run_id"] if record else None
        experiment = self.config.base.tracking.experiment
        tags = {KIND: "sweep", "code_version": code_version()}
        run_id = tracking.open_run(self.uri, experiment, self.config.name, settings, tags, known)
        self.folder.write_record(settings, run_id)
        return run_id

    def _connect(self) -> int:
        """Join the cluster; how many trials it places at a time. Their drivers take nothing that workers need."""
        workers, bundles = self.config.base.cluster, resource_request(self.config.base)
        os.environ.update(SWEEP_ENVIRONMENT | os.environ)
        connect(local_cpus=int(total(bundles)["CPU"] * (self.config.max_concurrent or 1)))
        check_resources(bundles, "a trial")
        fit = num_that_fit(bundles)
        if not fit:
            raise UserError(
                f"no trial can be placed: no node has room for a worker with {workers.cpus_per_worker:g} CPU"
            )
        return min(fit, self.config.max_concurrent or fit)

    def _asha(self) -> Asha | None:
        if self.search is None or self.search.algorithm != "asha":
            return None
        longest = max(planned.totals[0] for planned in self.trials.values())
        return Asha(self.journal, self.config.metric, self.search, longest)

    def _num_to_suggest(self) -> int:
        return self.search.num_trials - len(self.trials) if self.search else 0

    def _suggested(self) -> str | None:
        """The name of one more trial, with values that a searcher has thought of."""
        if self.search is None or not self._num_to_suggest():
            return None
        index = len(self.trials)
        known = [(self.trials[line.name].values, line.metric) for line in self.lines.values() if line.state == FINISHED]
        values = suggest(self.search, index, [(v, metric) for v, metric in known if metric is not None])
        planned = with_parent(self.planner.search_trial(trial_name(index), values), self.parent_run_id)
        self.journal.add(trial=planned.name, values=values)
        self.trials[planned.name] = planned
        self.lines[planned.name] = TrialLine(planned.name, planned.totals[0], planned.cost.training_flops)
        self.table.add(self.lines[planned.name])
        return planned.name

    def _totals(self) -> dict[str, Any]:
        """Compute spent, and what all trials would have taken to their end."""
        lines = self.lines.values()
        spent, whole = sum(x.samples * x.cost for x in lines), sum(x.total * x.cost for x in lines)
        return {
            "num_trials": len(lines),
            "num_finished": sum(line.state == FINISHED for line in lines),
            "num_stopped": sum(line.state == STOPPED for line in lines),
            "num_failed": sum(line.state == FAILED for line in lines),
            "training_flops": spent,
            "training_flops_of_all": whole,
            "share_saved": 1 - spent / whole,
        }

    def _best(self, search: SearchPlan) -> dict[str, Any] | None:
        sign = 1 if search.mode == "max" else -1
        ended = [line for line in self.lines.values() if line.state == FINISHED and line.metric is not None]
        if not ended:
            return None
        best = max(ended, key=lambda line: sign * (line.metric or 0.0))
        return {"trial": best.name, self.config.metric: best.metric, "values": self.trials[best.name].values}

    def _write_best(self, planned: Planned) -> StoragePath:
        """The recipe with the best trial's values, as a config that rayclip train takes."""
        config = trial_config(self.config.base, f"{self.config.name}-best", planned.values)
        path = self.folder.path / "best.yaml"
        values = config.model_dump(mode="json", exclude_unset=True)
        head = f"# The best of sweep {self.config.name}: {self.config.metric} {self.lines[planned.name].metric}\n"
        write_text(path, head + yaml.safe_dump(values, sort_keys=False))
        return path


def _decided(settings: dict[str, Any]) -> dict[str, Any]:
    """What must stay as it was when a sweep goes on: not how many trials a search has, nor how a ladder is read.

    The recipe is not among it: each run's own folder tells whether that changed.
    """
    decisive = without(settings, keys_with(SweepConfig, Effect.SAME_RESULT))
    return {"plan": decisive["plan"], "metric": decisive["metric"] if decisive["plan"]["kind"] == "search" else None}
