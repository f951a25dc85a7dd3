"""The training of one run on Ray, in a folder that is held: from the MLflow run's opening to the summary."""

from collections.abc import Callable, Generator
from concurrent.futures import wait
from contextlib import nullcontext, suppress
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayclip.config import ModelConfig, TrainConfig
from rayclip.data.stream import Stream, StreamSpec
from rayclip.errors import CrashedError, Interruption, UserError
from rayclip.evaluation.tasks import Evaluator
from rayclip.io.lease import Lease, LostError
from rayclip.io.paths import StoragePath
from rayclip.io.storage import format_path
from rayclip.models.weights import fit_weights
from rayclip.orchestration.cluster.connection import check_resources, connect
from rayclip.orchestration.cluster.progress import Line
from rayclip.orchestration.cluster.ray_storage import ray_storage
from rayclip.orchestration.cluster.ray_trainer import StreamTrainer
from rayclip.orchestration.cluster.resources import local_cpus, resource_request
from rayclip.orchestration.cluster.signals import Received, deferred_signals
from rayclip.orchestration.train.branch import branch_checkpoint, branch_tags
from rayclip.orchestration.train.follow import Evaluation, follow, start_fit
from rayclip.orchestration.train.run_context import RunContext
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.orchestration.train.run_page import fill_page, page_tags
from rayclip.orchestration.train.status import RunStatusActor
from rayclip.orchestration.train.stream import StreamConfig, latest_checkpoint
from rayclip.orchestration.train.summary import sum_up
from rayclip.orchestration.train.validation import validation_config
from rayclip.orchestration.train.worker import train_worker
from rayclip.tracking import mlflow as tracking
from rayclip.tracking.names import flatten
from rayclip.tracking.registry import resolve_model
from rayclip.training.checkpoint import read_metrics, read_state
from rayclip.version import code_version


def check_run(config: TrainConfig, spec: StreamSpec, is_new: bool) -> str:
    """The tracking store's address, after a look at all that can be wrong in what is beside the data.

    Raises UserError: as `check_inputs` does, and for a store that does not answer.
    """
    uri = tracking.resolve_uri(config.tracking.uri)
    tracking.connect(uri)
    check_inputs(config, spec, is_new)
    return uri


def check_inputs(config: TrainConfig, spec: StreamSpec, is_new: bool) -> None:
    """Raise UserError for evaluation tasks whose data cannot be used, and for weights that do not fit."""
    Evaluator(config.evaluation.tasks, spec.image_size, config.evaluation.batch_size).check()
    if config.weights is not None and is_new:
        assert isinstance(config.model, ModelConfig)
        fit_weights(resolve_model(config.weights, tracking.resolve_uri(config.tracking.uri)).folder, config.model)


def train(
    config: TrainConfig,
    folder: RunFolder,
    spec: StreamSpec,
    uri: str,
    new_line: Callable[..., Line],
    awaits_decision: bool,
    stops_on_signals: bool,
    lease: Lease,
) -> Generator[Evaluation | None, None, dict[str, Any]]:
    """Train in a folder that this process holds, as driver.start_training says; give the run's summary.

    What another process has left in the folder is read only now. Raises UserError.
    """
    complete, record = folder.read_summary(), folder.read_record()
    if complete is not None:
        return complete
    total_samples = Stream(spec).num_remaining()
    connect(local_cpus(config))
    check_resources(resource_request(config), _describe_processes(config))

    folder.repair_list()
    found = latest_checkpoint(str(folder.checkpoints))
    if found and read_state(found).manifest_digest != spec.digest:
        raise UserError(f"the data set in '{spec.folder}' is not the one that run '{config.name}' began with")
    parent_checkpoint = None if found or config.branch_from is None else branch_checkpoint(config, spec, total_samples)

    version = code_version()
    tags = page_tags(config, spec, version) | (branch_tags(parent_checkpoint) if parent_checkpoint else {})
    generation = (record or {}).get("generation", 0) + 1
    run_id = _open_mlflow_run(config, uri, folder, record, spec, tags, generation)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may go away
    status_actor = RunStatusActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    context = RunContext(
        config,
        spec,
        total_samples,
        str(folder.path),
        uri,
        run_id,
        version,
        status_actor,
        generation,
        lease.fence,
        parent_checkpoint,
        awaits_decision,
    )
    succeeded = stopped = False
    try:
        with deferred_signals() if stops_on_signals else nullcontext(Received()) as received:
            yield from _fit(context, folder, new_line, lease, received)
        lease.fence.check()
        succeeded = True
    except (GeneratorExit, KeyboardInterrupt):
        stopped = True
        raise
    except Exception:
        with suppress(OSError):
            lease.fence.check()  # where the run is lost, that is what is to be said
        raise
    finally:
        if not lease.is_lost():  # else it is another's, who may be logging to it
            tracking.close_run(uri, run_id, succeeded, stopped)
    summary = sum_up(config, folder, uri, run_id, Stream(spec).num_distinct())
    folder.write_summary(summary)
    return summary


def _describe_processes(config: TrainConfig) -> str:
    workers = f"a run with {config.cluster.min_workers} workers"
    if not config.evaluation.is_asynchronous:
        return f"{workers} and a reader"
    return f"{workers}, a reader and a process that measures beside them (evaluation.asynchronous)"


def _open_mlflow_run(
    config: TrainConfig,
    uri: str,
    folder: RunFolder,
    record: dict[str, Any] | None,
    spec: StreamSpec,
    tags: dict[str, str],
    generation: int,
) -> str:
    resolved = config.model_dump(mode="json")
    known: str | None = record["mlflow_run_id"] if record else None
    section = config.tracking
    run_id = tracking.open_run(
        uri, section.experiment, config.name, resolved, tags, known, section.parent_run_id, section.artifacts
    )
    folder.write_record(resolved, run_id, Stream(spec).manifest.parts(), generation)
    return run_id


def _fit(
    context: RunContext, folder: RunFolder, new_line: Callable[..., Line], lease: Lease, received: Received
) -> Generator[Evaluation | None, None, None]:
    config = context.config
    workers = config.cluster
    checkpoint = latest_checkpoint(str(folder.checkpoints))
    found = checkpoint or context.parent_checkpoint
    start = read_state(found).samples_seen if found else 0
    line = new_line(context.total_samples, start=start)
    line.note(f"MLflow run {tracking.run_address(context.tracking_uri, context.mlflow_run_id)}")
    if context.parent_checkpoint:
        line.note(f"branching off at {start:,} samples, from '{context.parent_checkpoint}'")
    elif found:
        line.note(f"going on with run '{config.name}' from {start:,} samples")
    if context.awaits_decision and checkpoint:
        yield _last_evaluation(checkpoint, context.total_samples)
    trainer = StreamTrainer(
        train_worker,
        train_loop_config={"job": context},
        # mypy reads the class of Train's first version.
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=workers.num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=workers.resize_every_s,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            **ray_storage(folder.checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                # Those of `at_samples` have the highest scores, so that they are the last to go.
                num_to_keep=config.checkpoint.keep + len(config.checkpoint.at_samples),
                checkpoint_score_attribute="score",
            ),
        ),
        datasets={"train": ray.data.range(1)},  # stands for the stream, which is made when the workers are known
        validation_config=validation_config(context)
        if context.validates_asynchronously or folder.has_pending_validation()
        else None,
        dataset_config=StreamConfig(context.spec, str(folder.checkpoints), context.parent_checkpoint),
        fence=context.fence,
        status_actor=context.status_actor,
    )
    fit = start_fit(trainer)
    try:
        fill_page(context, line)
        yield from follow(context.status_actor, line, fit, lease, received)
        fit.result()
    except ray.train.TrainingFailedError as error:
        lease.fence.check()
        mistake: Any = ray.get(context.status_actor.error.remote())
        if mistake:
            raise UserError(mistake) from error
        raise CrashedError(f"training failed after {workers.max_failures} restarts: {_last_line(error)}") from error
    except (KeyboardInterrupt, LostError):  # the workers end with this process
        raise
    except BaseException:  # whatever it is, workers that wait for a decision, now or later, hear that there is none
        ray.get(context.status_actor.end.remote())
        wait([fit])
        raise
    finally:
        line.close()
    mistake = ray.get(context.status_actor.error.remote())
    if mistake:
        raise UserError(mistake)
    if received.number is not None:
        _check_complete(context, folder, received.number)


def _check_complete(context: RunContext, folder: RunFolder, signal_number: int) -> None:
    """Raise Interruption where the workers have stopped before the end, with what is saved and how to go on."""
    checkpoint = latest_checkpoint(str(folder.checkpoints))
    state = read_state(checkpoint) if checkpoint else None
    if state and state.samples_consumed >= context.total_samples:
        return
    saved = "nothing was trained yet"
    if state:
        saved = f"saved at {state.samples_seen:,} samples, in {format_path(str(checkpoint))}"
    raise Interruption(signal_number, f"stopped: {saved}; the same command goes on from there")


def _last_evaluation(found: StoragePath, total_samples: int) -> Evaluation | None:
    """What the checkpoint's evaluation gave: the crash may have come before it was decided on. None: nothing to ask."""
    state, tasks = read_state(found), read_metrics(found)["tasks"]
    if state.samples_consumed >= total_samples or not tasks:
        return None
    return {"samples_seen": state.samples_seen, **flatten(tasks)}


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
