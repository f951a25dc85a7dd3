"""The training loop: plain torch, one process or many. Where batches come from and where results go is not its matter.

What has to happen on all ranks together (a checkpoint, an evaluation, a stop) is decided from numbers that all ranks
share.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from rayclip.config import GuardConfig, LossConfig, OptimizerConfig, Precision
from rayclip.data.decode import CAUSES, GUARD_CAUSES
from rayclip.data.ledger import Ledger
from rayclip.data.stream import Batch
from rayclip.distributed import all_gather_rows, world_size
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import RunState
from rayclip.training.data_parallel import data_parallel
from rayclip.training.ema import Ema
from rayclip.training.guard import Anomaly, Guard, Snapshot
from rayclip.training.meter import Meter
from rayclip.training.precision import in_precision
from rayclip.training.schedule import learning_rate
from rayclip.training.step import StepResult, train_step

Metrics = dict[str, Any]
Sample = tuple[int, int]
"""Position and row."""

_FEW_SAMPLES = 1_000  # below this many, a fraction of bad ones says little
_SHOWN_SHARDS = 3
_GUARD_CODES = [CAUSES.index(cause) for cause in GUARD_CAUSES]


@dataclass(frozen=True)
class LoopPlan:
    """How long a run is and how often it stops to look, in samples seen; `evaluate_every` None is at the end only."""

    optimizer: OptimizerConfig
    total_samples: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int | None
    max_bad_fraction: float
    loss: LossConfig = LossConfig()  # noqa: RUF009 (frozen)
    micro_batch_size: int | None = None
    precision: Precision = "float32"
    guard: GuardConfig = GuardConfig()  # noqa: RUF009 (frozen)
    checkpoint_at: tuple[int, ...] = ()
    """Counts of samples that came, readable or not: a checkpoint is made at the first step at or after each."""
    evaluate_asynchronously: bool = False
    """Whether evaluations before the last are left to whoever has the checkpoint."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls, each on every rank.

    `step` gets the metrics of every step, `log` those of a point to be recorded. `evaluate` measures the model as it
    is. `save` makes a checkpoint of the state, with what was measured (nothing, where nothing was; None, where it is
    to be measured from the checkpoint), and gets the samples of all ranks since the last one, int64 [n, 3] of
    (position, row, index into CAUSES).
    `notice` gets a line for people. `shard_of` names the shard at a position. `replay` gives this rank's share of
    samples that came before, int64 [n, 2] of (position, row), in equally many batches on all ranks; it is asked where
    the guard rolls back. `wants_stop` is asked at every step; where a rank says so, all ranks save and end after it.
    """

    step: Callable[[Metrics, RunState], None]
    log: Callable[[Metrics, RunState], None]
    evaluate: Callable[[], Metrics]
    save: Callable[[RunState, Metrics | None, np.ndarray], None]
    notice: Callable[[str], None] = lambda line: None
    replay: Callable[[np.ndarray], Iterable[Batch]] | None = None
    shard_of: Callable[[int], str] | None = None
    wants_stop: Callable[[], bool] = lambda: False


class Trainer:
    """Trains `model` from `state` on; `ledger` holds the samples that the weights have seen already.

    `ema`, where there is one, follows the model.
    """

    def __init__(
        self,
        plan: LoopPlan,
        model: CLIP,
        optimizer: Optimizer,
        state: RunState,
        ledger: Ledger,
        hooks: Hooks,
        ema: Ema | None = None,
    ) -> None:
        self.plan, self.model, self.optimizer, self.hooks, self.ema = plan, model, optimizer, hooks, ema
        self.state, self.ledger = state, ledger
        self._net = _data_parallel(in_precision(model, plan.precision))
        self._meter = Meter(state)
        self._count_from_checkpoint(0)
        self._guard = Guard(plan.guard, state.recent_losses)
        self._snapshot: Snapshot | None = None
        self._replay: Iterable[Batch] | None = None
        self._pending: set[Sample] = set()
        self._unsaved: list[np.ndarray] = []
        self._unreadable_in: Counter[str] = Counter()

    def run(self, batches: Iterable[Batch]) -> RunState:
        """Train to the end of `batches`, evaluate, save, and return the final state; or to where a stop is wanted, save
        there, and return the state so far.

        Raises UserError, on all ranks, for what the guard stops at and for too many unreadable samples.
        """
        self._take_snapshot()
        # The last checkpoint is made, measured, once: one that is made again would replace the one it goes on from.
        evaluated = self._samples_consumed() >= self.plan.total_samples
        self.model.train()
        for batch in self._meter.timed(self._with_replays(batches)):
            before, consumed_before = self.state.samples_seen, self._samples_consumed()
            stops = self._step(batch, before)
            if self._samples_consumed() == consumed_before and not stops:  # nothing but padding
                continue
            ends = self._samples_consumed() >= self.plan.total_samples
            evaluated = ends or self._due(before, self.plan.evaluate_every)
            reached = passes(self.plan.checkpoint_at, consumed_before, self._samples_consumed())
            if evaluated or reached or self._due(before, self.plan.checkpoint_every):
                self._checkpoint(evaluate=evaluated, last=ends)
            if stops and not ends:
                if self._unsaved:
                    self._checkpoint(evaluate=False, last=False)
                return self.state
        if not evaluated:
            self._checkpoint(evaluate=True, last=True)
        return self.state

    def _samples_consumed(self) -> int:
        """Samples that came, whether they could be read or not, in the whole run."""
        return self.state.samples_seen + self._num_skipped

    def _step(self, batch: Batch, before: int) -> bool:
        """Train on a batch; whether the run stops after it."""
        settings = self.plan.optimizer
        lr = learning_rate(before, settings, self.plan.total_samples)
        result = train_step(
            self._net, self.model, self.optimizer, batch, lr, settings.max_grad_norm,
            self.plan.loss, self.plan.micro_batch_size, self._guard, self.hooks.wants_stop(),
        )  # fmt: skip
        if self.ema and result.num_trained:
            self.ema.update(result.num_trained)
        self._account(batch, result)
        if result.anomaly:
            self._recover(result.anomaly)
        metrics = {
            "loss": result.loss,
            "learning_rate": lr,
            "logit_scale": result.logit_scale,
            "grad_norm": result.grad_norm,
        }
        self.hooks.step(metrics | {"rates": self._meter.rates()}, self.state)
        if self._due(before, self.plan.log_every):
            self.hooks.log(metrics | self._meter.rates(), self.state)
            self._meter.start_window()
        return result.stops

    def _account(self, batch: Batch, result: StepResult) -> None:
        given = np.stack([batch[name].astype(np.int64) for name in ("position", "row", "cause")], axis=1)
        if result.anomaly:
            given[batch["num_tokens"] > 0, 2] = CAUSES.index(result.anomaly.cause)
        self._unsaved.append(given[given[:, 0] >= 0])
        self.state.samples_seen += result.num_trained
        self.state.steps += result.num_trained > 0
        self._num_skipped += result.num_skipped + result.num_left_out
        self._num_left_out += result.num_left_out
        given_so_far = self._samples_consumed()
        allowed = self.plan.max_bad_fraction * max(given_so_far, min(_FEW_SAMPLES, self.plan.total_samples))
        if self._num_skipped - self._num_left_out > allowed:
            raise UserError(self._too_many_bad(given_so_far))

    def _recover(self, anomaly: Anomaly) -> None:
        guard = self.plan.guard
        self.state.interventions += 1
        if self.state.interventions > guard.max_interventions:
            raise UserError(f"{anomaly.text}; guard.max_interventions allows {guard.max_interventions}")
        if guard.action == "skip":
            self.hooks.notice(f"{anomaly.text}; skipped")
            return
        self._roll_back()
        self.hooks.notice(f"{anomaly.text}; went back to {self.state.samples_seen:,} samples, leaving them out")

    def _roll_back(self) -> None:
        """Take the weights of the last checkpoint; what came since then is owed once more, but for what is left out."""
        assert self._snapshot and self.hooks.replay
        seen, mine = self._gather_unsaved(), self._concat_unsaved()
        left_out = _is_left_out(seen)
        self._pending = (self._pending | _samples(seen)) - _samples(seen[left_out])
        self._unsaved = [mine[_is_left_out(mine)]]
        self._count_from_checkpoint(int(left_out.sum()))
        self._snapshot.restore(self.state)
        self._meter.start_window()
        self._replay = self.hooks.replay(np.array(sorted(self._pending), dtype=np.int64).reshape(-1, 2))

    def _count_from_checkpoint(self, num_left_out: int) -> None:
        """Count what was skipped up to the last checkpoint, and what was left out since."""
        skipped = self.state.skipped
        self._num_skipped = sum(skipped.values()) + num_left_out
        self._num_left_out = sum(skipped.get(cause, 0) for cause in GUARD_CAUSES) + num_left_out

    def _with_replays(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            while self._replay is not None:
                replay, self._replay = self._replay, None
                for again in replay:
                    yield again
                    if self._replay is not None:  # it was rolled back once more
                        break

    def _take_snapshot(self) -> None:
        if self.plan.guard.action == "roll_back":
            self._snapshot = Snapshot(self.model, self.optimizer, self.ema, self.state)

    def _checkpoint(self, evaluate: bool, last: bool) -> None:
        started = time.perf_counter()
        seen = self._gather_unsaved()
        self.ledger.add(seen[:, 0], seen[:, 1])
        self._unreadable_in += self._shards_of_unreadable(seen)
        self.state.skipped, self.state.ledger = self._count_skipped(seen), self.ledger.to_dict()
        self._unsaved = []
        self._pending -= _samples(seen) if self._pending else set()
        self._take_snapshot()
        metrics = self._measure(last) if evaluate else {}
        self.model.train()
        self.hooks.save(self.state, metrics, seen)
        self._meter.pause(time.perf_counter() - started)

    def _measure(self, last: bool) -> Metrics | None:
        return None if self.plan.evaluate_asynchronously and not last else self.hooks.evaluate()

    def _gather_unsaved(self) -> np.ndarray:
        return all_gather_rows(torch.from_numpy(self._concat_unsaved())).numpy()

    def _concat_unsaved(self) -> np.ndarray:
        return np.concatenate([np.empty((0, 3), dtype=np.int64), *self._unsaved])

    def _too_many_bad(self, given_so_far: int) -> str:
        seen = self._gather_unsaved()
        skipped = self._count_skipped(seen[~_is_left_out(seen)])
        shown = ", ".join(f"{cause} {count:,}" for cause, count in skipped.items() if cause not in GUARD_CAUSES)
        return (
            f"{self._num_skipped - self._num_left_out:,} of {given_so_far:,} samples could not be read ({shown}"
            f"{self._worst_shards(seen)}); data.max_bad_fraction allows {self.plan.max_bad_fraction:g}"
        )

    def _worst_shards(self, seen: np.ndarray) -> str:
        """As in "; most in 00017.tar 40, 00003.tar 12", since these workers have started."""
        counts = self._unreadable_in + self._shards_of_unreadable(seen)
        worst = ", ".join(f"{shard} {count:,}" for shard, count in counts.most_common(_SHOWN_SHARDS))
        return f"; most in {worst}" if worst else ""

    def _shards_of_unreadable(self, seen: np.ndarray) -> Counter[str]:
        if self.hooks.shard_of is None:
            return Counter()
        unreadable = seen[(seen[:, 2] > 0) & ~_is_left_out(seen), 0]
        return Counter(self.hooks.shard_of(position) for position in unreadable.tolist())

    def _count_skipped(self, seen: np.ndarray) -> dict[str, int]:
        """What was skipped up to the last checkpoint and in `seen`, by cause, the commonest first."""
        causes = Counter(CAUSES[cause] for cause in seen[seen[:, 2] > 0, 2].tolist())
        return dict((Counter(self.state.skipped) + causes).most_common())

    def _due(self, before: int, every: int | None) -> bool:
        return every is not None and before // every < self.state.samples_seen // every


def passes(marks: tuple[int, ...], before: int, after: int) -> bool:
    """Whether a count that went from `before` to `after` reached one of the marks on its way."""
    return any(before < mark <= after for mark in marks)


def _is_left_out(rows: np.ndarray) -> np.ndarray:
    """Which samples the guard left out, bool [N]."""
    return np.isin(rows[:, 2], _GUARD_CODES)


def _samples(rows: np.ndarray) -> set[Sample]:
    return {(position, row) for position, row in rows[:, :2].tolist()}


def _data_parallel(model: nn.Module) -> nn.Module:
    if world_size() == 1:
        return model
    # A batch norm's statistics are those of the first rank: that is whose weights are saved.
    has_statistics = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return data_parallel(model, broadcast_buffers=has_statistics, gradient_as_bucket_view=True)
