"""What a sweep consists of: its trials, what each of their runs costs, and what has been done of them already."""

from dataclasses import dataclass, replace
from typing import Any

from mlflow import MlflowClient

from rayclip.config import LadderPlan, ModelConfig, SearchPlan, SweepConfig, TrainConfig
from rayclip.data.stream import Stream
from rayclip.errors import UserError
from rayclip.evaluation.tasks import Evaluator
from rayclip.io.paths import StoragePath, storage_path
from rayclip.orchestration.cluster.progress import note
from rayclip.orchestration.sweep.search import Journal
from rayclip.orchestration.sweep.table import FINISHED, STOPPED, TrialLine
from rayclip.orchestration.train.plan import has_other_data, plan_stream, resolve
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.scaling.ladder import Trial, plan_ladder
from rayclip.scaling.rungs import Counted, Row, count, make_row
from rayclip.scaling.search import Values, check_space, draw, trial_config, trial_name
from rayclip.tracking.experiment import mean_of_last
from rayclip.tracking.names import flatten

_COUNTED_CAPTIONS = 1024
_LAST_SHARE = 0.1  # of a run's samples, over which its training loss is the mean


class Outcomes:
    """What runs that have ended came to, each looked up once."""

    def __init__(self, metric: str, client: MlflowClient) -> None:
        self.metric = metric
        self._client = client
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, run: TrainConfig) -> dict[str, Any] | None:
        """What a row says of the run; None for one that has not ended."""
        if run.name not in self._known:
            summary = run_folder(run).read_summary()
            if summary is None:
                return None
            self._known[run.name] = self._read(run, summary)
        return self._known[run.name]

    def _read(self, run: TrainConfig, summary: dict[str, Any]) -> dict[str, Any]:
        names = [f"{name}.{m}" for name, task in run.evaluation.tasks.items() for m in task.metrics]
        values, samples = measured(summary), summary["samples_seen"]
        return {
            "samples": samples,
            "unique_samples": summary["unique_samples"],
            "train_loss": mean_of_last(self._client, summary["mlflow_run_id"], "train/loss", _LAST_SHARE),
            "error": 1 - values[self.metric],
            "metrics": {name: values[name] for name in names},
            "wall_time_s": summary["train_time_s"],
            "device": summary["device"],
        }


@dataclass(frozen=True)
class Planned:
    """A trial; `values` are those that a search gave it. `starts` and `totals` are the samples that each run has seen
    when it begins, and when it ends.
    """

    trial: Trial
    values: Values
    starts: tuple[int, ...]
    totals: tuple[int, ...]
    cost: Counted

    @property
    def name(self) -> str:
        """Name of the trial."""
        return self.trial.name

    def check_same(self) -> None:
        """Raise UserError where the folder of one of its runs holds a run with other settings, or of other data."""
        for run in self.trial.runs:
            folder = run_folder(run)
            record = folder.read_record()
            if record is not None:
                folder.check_same(record, run.model_dump(mode="json"))
            summary = folder.read_summary()
            if summary is not None and has_other_data(run, summary):
                raise UserError(
                    f"'{folder.path}' was trained on a data set that has changed since, and the other trials could not "
                    "be compared with it: give the sweep another name"
                )

    def line(self, journal: Journal, metric: str) -> TrialLine:
        """Its line in the table of trials, as it stands before the sweep goes on."""
        summaries = [run_folder(run).read_summary() for run in self.trial.runs]
        trained = [end - start for start, end in zip(self.starts, self.totals, strict=True)]
        line = TrialLine(self.name, sum(trained), self.cost.training_flops)
        line.samples = sum(n for n, summary in zip(trained, summaries, strict=True) if summary)
        stopped = journal.stopped_at(self.name)
        if all(summaries):
            line.state, line.metric = FINISHED, measured(summaries[-1] or {}).get(metric)
        elif stopped:
            line.state, line.samples, line.metric = STOPPED, stopped["samples_seen"], stopped["metric"]
        return line

    def rows(self, line: TrialLine, outcomes: Outcomes) -> list[Row]:
        """Its rows of the table of runs: a ladder's rungs, or the run of a search."""
        shapes = {rung.name: rung.shape for rung in self.trial.rungs}
        rows = []
        for run in self.trial.runs:
            if shapes and run.name not in shapes:
                continue
            known = outcomes.of(run)
            row = make_row(run, self.cost, FINISHED if known else line.state, known or {}, shapes.get(run.name))
            if not known and line.state == STOPPED:
                row |= {"samples": line.samples, outcomes.metric: line.metric}
            rows.append({**row, **self.values} | ({"reason": line.reason} if line.reason else {}))
        return rows


class TrialPlanner:
    """Plans the trials of a sweep. Nothing is written."""

    def __init__(self, config: SweepConfig, base: TrainConfig, folder: StoragePath, journal: Journal) -> None:
        self.config, self.plan, self.base, self.folder, self.journal = config, config.plan, base, folder, journal
        self._lengths: list[int] | None = None

    def trials(self) -> list[Planned]:
        """All, those left out that a searcher has yet to think of. Raises UserError for what cannot be trained."""
        if isinstance(self.plan, LadderPlan):
            ladder = plan_ladder(self.plan, self.base, str(self.folder))
            for dropped in ladder.dropped:
                note(f"{dropped.name} is left out: {dropped.reason}")
            return [self._planned(trial, {}) for trial in ladder.trials]
        check_space(self.config.base, self.plan)
        names = [trial_name(index) for index in range(self.plan.num_trials)]
        if self.plan.algorithm == "tpe":
            given = [(name, self.journal.values(name)) for name in names]
            return [self.search_trial(name, values) for name, values in given if values is not None]
        return [self.search_trial(name, draw(self.plan.space, self.plan.seed, i)) for i, name in enumerate(names)]

    def search_trial(self, name: str, values: Values) -> Planned:
        """The trial of a search that has these values."""
        config = trial_config(self.config.base, name, values)
        kept = {"runs": str(self.folder), "tracking": self.base.tracking, "evaluation": self.base.evaluation}
        planned = self._planned(Trial(name, (resolve(config.model_copy(update=kept)),), ()), values)
        assert isinstance(self.plan, SearchPlan)
        if self.plan.grace_samples and self.plan.grace_samples >= planned.totals[0]:
            raise UserError(
                f"plan.grace_samples {self.plan.grace_samples:,} is not below a run's {planned.totals[0]:,}"
            )
        return planned

    def _planned(self, trial: Trial, values: Values) -> Planned:
        totals = []
        for run in trial.runs:
            spec = plan_stream(run)
            totals.append(Stream(spec).num_remaining())
            if self._lengths is None:
                tasks = self.base.evaluation
                Evaluator(tasks.tasks, spec.image_size, tasks.batch_size).check()
                self._lengths = caption_lengths(Stream(spec))
        model = trial.runs[0].model
        assert isinstance(model, ModelConfig) and self._lengths is not None
        return Planned(trial, values, tuple(map(_start, trial.runs)), tuple(totals), count(model, self._lengths))


def with_parent(planned: Planned, run_id: str) -> Planned:
    """The trial, its runs nested in the sweep's."""
    tracking = [run.tracking.model_copy(update={"parent_run_id": run_id}) for run in planned.trial.runs]
    runs = tuple(run.model_copy(update={"tracking": t}) for run, t in zip(planned.trial.runs, tracking, strict=True))
    return replace(planned, trial=replace(planned.trial, runs=runs))


def caption_lengths(stream: Stream) -> list[int]:
    """Tokens of the captions that the stream begins with, about a thousand."""
    lengths: list[int] = []
    for window in stream.windows():
        block = stream.read(window)
        lengths += block["num_tokens"][block["num_tokens"] > 0].tolist()
        if len(lengths) >= _COUNTED_CAPTIONS:
            break
    return lengths


def run_folder(run: TrainConfig) -> RunFolder:
    """Return the folder of a run."""
    return RunFolder(storage_path(run.runs) / run.name)


def measured(summary: dict[str, Any]) -> dict[str, float]:
    """TASK.METRIC of a run's summary."""
    return flatten(summary.get("zero_shot", {})) | flatten(summary.get("retrieval", {}))


def _start(run: TrainConfig) -> int:
    """Samples that a branch takes over from its trunk."""
    at = (run.branch_from or "").rpartition("@")[2]
    return int(at) if at.isdigit() else 0
