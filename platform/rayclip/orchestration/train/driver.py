"""Training on a Ray cluster: the driver's side. `worker.py` is what runs on each worker.

The driver checks everything that can be wrong before anything is started, opens the MLflow run, lets Ray Train keep
the workers alive, shows how far they are, and registers the best checkpoint at the end.
"""

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from rayclip.config import TrainConfig
from rayclip.data.stream import Stream
from rayclip.io.lease import hold
from rayclip.io.paths import storage_path
from rayclip.orchestration.cluster.connection import begin_connecting
from rayclip.orchestration.cluster.progress import Line, ProgressLine
from rayclip.orchestration.cluster.resources import local_cpus
from rayclip.orchestration.train.plan import has_other_data, plan_stream, resolve
from rayclip.orchestration.train.run_folder import RunFolder

if TYPE_CHECKING:
    from rayclip.orchestration.train.follow import Evaluation


_PROCESSES_BESIDE_WORKERS = 8
"""Ray Train's controller, its two actors, Ray Data's two, a reader, and ours for the run's status and its segments."""


def run_training(config: TrainConfig, new_line: Callable[..., Line] = ProgressLine) -> dict[str, Any]:
    """Train, or go on with a run that was interrupted, and return its summary. One that is complete is left as it is.

    `new_line(total, start=samples_seen)` makes what shows the progress. Raises UserError for everything that a user can
    mend, CrashedError among it; and Interruption where SIGINT or SIGTERM came: the first lets the workers save a
    checkpoint at the step they are at, the second ends at once.
    """
    training = start_training(config, new_line, stops_on_signals=True)
    while True:
        try:
            next(training)
        except StopIteration as ended:
            summary: dict[str, Any] = ended.value
            return summary


def check_training(config: TrainConfig) -> None:
    """Raise the UserError of settings, data, tasks or weights that a run would refuse; start nothing."""
    config = resolve(config)
    folder = RunFolder(storage_path(config.runs) / config.name)
    record = folder.read_record()
    if record is not None:
        folder.check_same(record, config.model_dump(mode="json"))
    if folder.read_summary() is not None:
        return
    spec = plan_stream(config, may_lack_shards=folder.has_checkpoints())
    from rayclip.orchestration.train.fit import check_inputs

    check_inputs(config, spec, is_new=record is None)


def start_training(
    config: TrainConfig, new_line: Callable[..., Line], awaits_decision: bool = False, stops_on_signals: bool = False
) -> Generator["Evaluation | None", None, dict[str, Any]]:
    """`run_training` as a generator, which yields now and then while the workers train.

    Where `awaits_decision`, it yields each evaluation, and the workers wait: for `next`, and the run goes on; or for
    `close`, and it ends there. Every other time it yields None, and `close` lets the workers save and end.
    """
    config = resolve(config)
    folder = RunFolder(storage_path(config.runs) / config.name)
    record = folder.read_record()
    if record is not None:
        folder.check_same(record, config.model_dump(mode="json"))
    complete = folder.read_summary()
    if complete is not None:
        since = ""
        if has_other_data(config, complete):
            since = "; its data set has changed since, and it was not trained on what is there now"
        if not storage_path(complete["checkpoint"]).exists():
            since += f"; its checkpoint '{complete['checkpoint']}' is gone"
        new_line(complete["samples_seen"]).note(f"run '{config.name}' is complete already{since}")
        return complete
    spec = plan_stream(config, may_lack_shards=folder.has_checkpoints())
    with hold(folder.path, f"run '{config.name}'", say=new_line(Stream(spec).num_remaining()).note) as lease:
        # Ray's processes start while torch, MLflow and Ray Train are imported: seconds each.
        processes = config.cluster.min_workers + _PROCESSES_BESIDE_WORKERS  # more workers may never find room
        begin_connecting(local_cpus(config), processes, "rayclip.orchestration.train.segments")
        from rayclip.orchestration.train.fit import check_run, train

        uri = check_run(config, spec, is_new=record is None)
        return (yield from train(config, folder, spec, uri, new_line, awaits_decision, stops_on_signals, lease))
