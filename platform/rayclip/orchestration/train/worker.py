"""Training on a Ray cluster: what runs on each worker. It adapts Ray Train's stream and reports to the pure loop."""

import json
import platform
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch

from rayclip.config import ModelConfig
from rayclip.data.decode import CAUSES
from rayclip.data.stream import Batch, Stream
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.evaluation.contact_sheet import write_sample_sheet
from rayclip.io.files import write_text
from rayclip.io.lease import LostError
from rayclip.io.paths import RemotePath, StoragePath, append, local_copy, staged, storage_path
from rayclip.models.clip import CLIP
from rayclip.models.transformer import checkpoint_activations, compile_blocks
from rayclip.models.weights import fit_weights
from rayclip.orchestration.cluster.ray_storage import upload_checkpoint
from rayclip.orchestration.train.checkpoint_metrics import (
    checkpoint_metrics,
    constants,
    evaluate_model,
    format_metrics,
    mlflow_metrics,
    with_ema,
)
from rayclip.orchestration.train.failures import describe_failure
from rayclip.orchestration.train.run_context import RunContext, StoppedError
from rayclip.orchestration.train.run_folder import RunFolder
from rayclip.orchestration.train.validation import pending_checkpoints, validation_task, wait_until_validated
from rayclip.tracking.names import flatten
from rayclip.training.checkpoint import RunState, read_metrics, restore, write_checkpoint
from rayclip.training.ema import Ema
from rayclip.training.loop import Hooks, LoopPlan, Metrics, Trainer, passes
from rayclip.training.optimizer import RowAdamW, build_optimizer

if TYPE_CHECKING:
    from rayclip.tracking.mlflow import MlflowTracker

_PROGRESS_EVERY_S = 0.5
_NUM_SHOWN_SAMPLES = 24
_KEPT_SCORE = 1e18  # above any metric and any number of samples: Ray deletes what has the least


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry point on each worker."""
    context: RunContext = config["job"]
    worker = TrainingWorker(context)
    try:
        worker.run()
    except StoppedError:
        pass
    except LostError as error:
        # The others wait for this one: it fails, and Ray Train, which asks the actor, starts nobody again.
        ray.get(context.status_actor.stop.remote(str(error)))
        raise
    except UserError as error:
        # Raised on all workers alike; an exception here would only make Ray try the same again.
        if worker.is_first:
            ray.get(context.status_actor.stop.remote(str(error)))
    except Exception as error:
        if failure := describe_failure(error):
            ray.get(context.status_actor.add_failure.remote(worker.rank, failure, worker.samples_seen))
        raise
    finally:
        worker.close()


class TrainingWorker:
    """One process of the run: model, optimizer and hooks around the pure loop."""

    def __init__(self, context: RunContext) -> None:
        self.context, self.config = context, context.config
        self.folder = RunFolder(storage_path(context.folder))
        train_context = ray.train.get_context()
        self.rank = train_context.get_world_rank()
        self.is_first = self.rank == 0
        self.world_size = train_context.get_world_size()
        self.samples_seen = 0
        self._shown_at = 0.0
        self._answer: ray.ObjectRef | None = None
        self._stops = False
        # First of all: what reads the stream starts while this process gets ready.
        self._shown_samples: tuple[np.ndarray, np.ndarray] | None = None
        self.batches = self._noting_samples(ray.train.get_dataset_shard("train").batches(self._local_batch))
        self._opening_tracker: Future[MlflowTracker] | None = None

    def run(self) -> None:
        """Train from the latest checkpoint to the end of the stream."""
        assert isinstance(self.config.model, ModelConfig)
        torch.manual_seed(self.config.seed)
        self.model = self._new_model(self.config.model).to(ray.train.torch.get_device())
        if self.config.activation_checkpointing:
            checkpoint_activations(self.model)
        if self.config.compile:
            compile_blocks(self.model)
        self.optimizer: RowAdamW = build_optimizer(self.model, self.config.optimizer)
        self.ema = Ema(self.model, self.config.ema) if self.config.ema else None
        state = self._restore()
        self.samples_seen = state.samples_seen
        ledger = Stream(self.context.spec, state.ledger).ledger()
        hooks = Hooks(
            self._step,
            self._log,
            self._evaluate,
            self._save,
            self._notice,
            self._replay,
            Stream(self.context.spec).shard_at,
            self._wants_stop,
        )
        trainer = Trainer(self._plan(), self.model, self.optimizer, state, ledger, hooks, self.ema)
        if not isinstance(self.config.cluster.num_workers, int):
            self._notice(f"training on {self.world_size} workers, {self.world_size * self._local_batch} pairs a step")
        trainer.run(self.batches)

    @property
    def tracker(self) -> "MlflowTracker":
        """Return what logs to MLflow, on the first worker; it is opened beside the steps after the first one."""
        return self._open_tracker().result()

    def _open_tracker(self) -> "Future[MlflowTracker]":
        if self._opening_tracker is None:
            opener = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
            self._opening_tracker = opener.submit(self._new_tracker)
        return self._opening_tracker

    def _new_tracker(self) -> "MlflowTracker":
        from rayclip.tracking.mlflow import MlflowTracker  # takes seconds, which no step waits for

        tracker = MlflowTracker(self.context.tracking_uri, self.context.mlflow_run_id, self.context.fence.check)
        if self._shown_samples is not None:
            images, tokens = self._shown_samples
            tokenizer = get_tokenizer(self.context.spec.context_length)
            with tempfile.TemporaryDirectory() as scratch:
                captions = [tokenizer.decode(row) for row in tokens]
                tracker.log_image(write_sample_sheet(Path(scratch) / "training_samples.png", images, captions))
        return tracker

    def _noting_samples(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the first readable samples of this start are kept, to be shown in MLflow."""
        for batch in batches:
            if self._shown_samples is None:
                readable = np.flatnonzero(batch["num_tokens"] > 0)[:_NUM_SHOWN_SAMPLES]
                if len(readable):
                    self._shown_samples = batch["image"][readable], batch["tokens"][readable]
            yield batch

    @property
    def _local_batch(self) -> int:
        """Pairs of this worker a step. Where the workers do not divide the batch it is a little smaller."""
        return self.config.batch_size // self.world_size

    def close(self) -> None:
        """Send what is left to MLflow."""
        if self._opening_tracker is not None:
            self.tracker.close()

    def _plan(self) -> LoopPlan:
        config = self.config
        return LoopPlan(
            optimizer=config.optimizer,
            total_samples=self.context.total_samples,
            log_every=config.tracking.log_every_samples,
            checkpoint_every=config.checkpoint.every_samples,
            evaluate_every=config.evaluation.every_samples,
            max_bad_fraction=config.data.max_bad_fraction,
            loss=config.loss,
            micro_batch_size=config.micro_batch_size,
            precision=config.precision,
            guard=config.guard,
            checkpoint_at=config.checkpoint.at_samples,
            evaluate_asynchronously=self.context.validates_asynchronously,
        )

    def _new_model(self, settings: ModelConfig) -> CLIP:
        """Fresh, or with the weights that a run starts from; a checkpoint, where there is one, is restored later."""
        model = CLIP(settings)
        if self.config.weights is not None and ray.train.get_checkpoint() is None:
            from rayclip.tracking.registry import resolve_model

            source = resolve_model(self.config.weights, self.context.tracking_uri)
            model.load_state_dict(fit_weights(source.folder, settings))
        if self.config.lock != "none":
            model.lock(self.config.lock)
        return model

    def _restore(self) -> RunState:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None and self.context.parent_checkpoint:
            with local_copy(self.context.parent_checkpoint) as path:
                state = restore(path, self.model, self.optimizer, self.ema).branch()
        elif checkpoint is None:
            state = RunState(manifest_digest=self.context.spec.digest)
        else:
            with checkpoint.as_directory() as path:
                state = restore(Path(path), self.model, self.optimizer, self.ema)
            name = Path(checkpoint.path).name
            if self.is_first and name not in pending_checkpoints():
                folder = self.folder.checkpoints / name
                self.context.link_checkpoint(folder, state.samples_seen, read_metrics(folder)["tasks"])
        if state.manifest_digest != self.context.spec.digest:
            raise UserError(f"the data set in '{self.context.spec.folder}' is not the one this run began with")
        if state.generation > self.context.generation:
            self.context.fence.check()  # names who has saved it
        state.generation = self.context.generation
        state.code_version, state.device = self.context.code_version, _device_name()
        if self.is_first:
            self.context.fence.check()
            _forget_quarantined_after(self.folder.quarantine, state.samples_seen)
        return state

    def _step(self, metrics: Metrics, state: RunState) -> None:
        self.samples_seen = state.samples_seen
        if not self.is_first:
            return
        self._open_tracker()
        shown_lately = time.monotonic() - self._shown_at < _PROGRESS_EVERY_S
        if shown_lately and state.samples_seen < self.context.total_samples:
            return
        self._shown_at = time.monotonic()
        shown = {"samples_seen": state.samples_seen, "loss": metrics["loss"], **metrics["rates"]}
        self._answer = self.context.status_actor.update.remote(shown)

    def _wants_stop(self) -> bool:
        """Whether the driver has answered the last word on progress so; nobody waits for the answer."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stops, self._answer = ray.get(self._answer), None
        return self._stops

    def _log(self, metrics: Metrics, state: RunState) -> None:
        if self.is_first:
            named = {f"train/{key}": value for key, value in metrics.items()}
            self.tracker.log({"loss": metrics["loss"], **named}, state.samples_seen)

    def _notice(self, line: str) -> None:
        if self.is_first:
            self.context.status_actor.note.remote(line)

    def _replay(self, samples: np.ndarray) -> Iterator[Batch]:
        return Stream(self.context.spec).again(samples, self._local_batch, self.rank, self.world_size)

    def _evaluate(self) -> Metrics:
        self._wait_until_validated()
        with staged(self.folder.contact_sheets) as contact_sheets:
            metrics = evaluate_model(self.config, self.model, contact_sheets if self.is_first else None)
        if self.ema is None:
            return metrics
        with self.ema.in_place():
            return with_ema(metrics, evaluate_model(self.config, self.model))

    def _wait_until_validated(self) -> None:
        """Wait for what is measured beside training: it comes in order, and no more than one checkpoint is behind."""
        if not self.context.validates_asynchronously:
            return
        for name in pending_checkpoints() if self.is_first else ():
            self._notice(f"waiting for the evaluation at {int(name[-12:]):,} samples")
        wait_until_validated()

    def _save(self, state: RunState, metrics: Metrics | None, seen: np.ndarray) -> None:
        """Metrics of None are measured beside training, from the checkpoint."""
        name = f"samples-{state.samples_seen:012}"
        if metrics is None:
            self._wait_until_validated()
        content = checkpoint_metrics(self.config, state.samples_seen, metrics or {})
        is_kept = passes(self.config.checkpoint.at_samples, state.samples_consumed - len(seen), state.samples_consumed)
        reported = {"score": _KEPT_SCORE if is_kept else content["score"]}
        if not self.is_first:
            ray.train.report(reported, checkpoint_dir_name=name)
            self._wait_for_decision(state, metrics)
            return
        self.context.fence.check()
        validation = validation_task(state.samples_seen, is_kept) if metrics is None else False
        self._quarantine(seen[seen[:, 2] > 0], state.samples_seen)
        config = self.config.model_dump(mode="json")
        with tempfile.TemporaryDirectory() as scratch:
            write_checkpoint(Path(scratch) / name, self.model, self.optimizer, state, config, content, self.ema)
            if self.config.checkpoint.record_samples:
                np.save(Path(scratch) / name / "samples.npy", seen)
            checkpoint = ray.train.Checkpoint.from_directory(str(Path(scratch) / name))
            there = self.folder.checkpoints / name
            check = self.context.fence.check
            upload = (
                (lambda written, _: upload_checkpoint(written, there, check)) if isinstance(there, RemotePath) else None
            )
            ray.train.report(
                reported,
                checkpoint=checkpoint,
                checkpoint_dir_name=name,
                checkpoint_upload_fn=upload,
                validation=validation,
            )
        self.context.fence.check()
        if not (there / "state.json").is_file():
            return  # Ray keeps nothing where another worker has died meanwhile; it is about to start all anew
        self.folder.back_up_list()
        self.tracker.log({f"skipped/{cause}": count for cause, count in state.skipped.items()}, state.samples_seen)
        if metrics is not None:
            self.context.link_checkpoint(there, state.samples_seen, metrics)
        if metrics:
            self._show(metrics, state)
        self._wait_for_decision(state, metrics)

    def _wait_for_decision(self, state: RunState, metrics: Metrics | None) -> None:
        """Raise StoppedError, on all workers, where the run does not go on; one that has ended has nothing to ask."""
        if not (self.context.awaits_decision and metrics) or state.samples_consumed >= self.context.total_samples:
            return
        if self.is_first:
            evaluation = {"samples_seen": state.samples_seen, **flatten(metrics)}
            self.context.status_actor.add_evaluation.remote(evaluation)
        if not ray.get(self.context.status_actor.goes_on.remote(state.samples_seen)):
            raise StoppedError

    def _show(self, metrics: Metrics, state: RunState) -> None:
        self.tracker.log(mlflow_metrics(metrics), state.samples_seen)
        self.tracker.log_constants(constants(metrics))
        with local_copy(self.folder.contact_sheets) as contact_sheets:
            for image in contact_sheets.glob("*.png"):
                self.tracker.log_image(image)
        self._notice(format_metrics(state.samples_seen, metrics))

    def _quarantine(self, skipped: np.ndarray, samples_seen: int) -> None:
        stream = Stream(self.context.spec)
        lines = []
        for position, row, cause in skipped.tolist():
            shard, offset = stream.place_at(position)
            lines.append({"cause": CAUSES[cause], "shard": shard, "offset": offset,
                          "row": row, "position": position, "samples_seen": samples_seen})  # fmt: skip
        if lines:
            append(self.folder.quarantine, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _device_name() -> str:
    device = ray.train.torch.get_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def _forget_quarantined_after(path: StoragePath, samples_seen: int) -> None:
    """Drop what was written for a checkpoint that was never finished; the stream meets those samples again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["samples_seen"] <= samples_seen]
        write_text(path, "".join(line + "\n" for line in lines))
