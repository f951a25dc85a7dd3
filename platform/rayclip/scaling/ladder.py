"""The ladder: which runs a scaling law needs, each with its whole config, and what they cost before any is started.

A run that ends needs its learning rate brought down, so runs of several lengths cannot be one cosine. With
warm-up-stable-decay they can nearly be one: a trunk of constant rate for each shape, and from it a cooldown for each
budget (Hägele et al., arXiv:2405.18392, whose share of a fifth and whose shape, 1 - sqrt, are the defaults).

The rules for a rung's settings:

- rate: the recipe's, times (width of the recipe's image tower / the shape's) to a power. CLIP's own rates, 5e-4 at
  width 768 and 4e-4 at 1024, make it 0.78; muP (arXiv:2203.03466) gives hidden matrices 1.
- batch: the recipe's, on every rung. It is the number of negatives, so a part of the task and not of the noise alone;
  and branches go on in the steps of their trunk.
- warm-up: a share of the smallest budget, in all rungs: those of one trunk have it in common.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rayclip.config import EvaluationConfig, LadderConfig, ModelConfig, TrainConfig, VisionConfig
from rayclip.errors import UserError
from rayclip.models.presets import preset
from rayclip.scaling.flops import forward_gmacs, training_flops

_STAGES_WIDEN = 32  # channels at a ResNet's end over those of its stem


@dataclass(frozen=True)
class Rung:
    """One measured run. `gmacs` is of one pair forward, `training_flops_full_context` of `samples` pairs seen, as if
    the run were trained by itself.
    """

    name: str
    shape: str
    config: TrainConfig
    gmacs: float
    training_flops_full_context: int
    samples: int
    data_fraction: float


@dataclass(frozen=True)
class Trial:
    """Runs that go one after another, `rungs` being those of them that are measured.

    With wsd the trunk comes first, then the branches from the shortest to the longest.
    """

    name: str
    runs: tuple[TrainConfig, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Dropped:
    """A rung that is left out, and why."""

    name: str
    training_flops: int
    reason: str


@dataclass(frozen=True)
class Ladder:
    """The plan. `flops_total` is what its runs train in all, `flops_separate` what its rungs would as separate runs."""

    trials: tuple[Trial, ...]
    dropped: tuple[Dropped, ...]
    flops_total: int
    flops_separate: int

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """All measured runs of the ladder."""
        return tuple(rung for trial in self.trials for rung in trial.rungs)

    @property
    def share_saved(self) -> float:
        """Of the compute of separate runs."""
        return 1 - self.flops_total / self.flops_separate


@dataclass(frozen=True)
class _Step:
    """A place on the ladder, before it has a config."""

    shape: str
    fraction: float
    samples: int
    flops: int

    @property
    def trial(self) -> str:
        return self.shape if self.fraction == 1 else f"{self.shape}-f{self.fraction:g}"

    @property
    def name(self) -> str:
        return f"{self.trial}-{self.samples}"


def plan_ladder(ladder: LadderConfig, base: TrainConfig, folder: str) -> Ladder:
    """All runs of a ladder, their folders in `folder`; `base` is the recipe: data, evaluation, batch, its model's rate.

    Raises UserError for an unknown preset, a budget that is too small for its phases, and a `max_flops` below that of
    the cheapest rung.
    """
    planner = _Planner(ladder, base, folder)
    kept, dropped = planner.within_budget(planner.steps())
    groups: dict[str, list[_Step]] = {}
    for step in kept:
        groups.setdefault(step.trial, []).append(step)
    trials = [trial for steps in groups.values() for trial in planner.trials(steps)]
    return Ladder(tuple(trials), tuple(dropped), planner.flops(kept), sum(step.flops for step in kept))


class _Planner:
    def __init__(self, ladder: LadderConfig, base: TrainConfig, folder: str) -> None:
        self.ladder, self.base, self.folder = ladder, base, folder
        self.models = {name: _model(shape) for name, shape in ladder.shapes.items()}
        self.warmup = round(ladder.warmup_share * min(ladder.samples))

    def steps(self) -> list[_Step]:
        """Every rung, those of a trial together and the shortest first."""
        steps = []
        for shape, model in self.models.items():
            flops = training_flops(model, 1)
            for fraction in self.ladder.data_fractions:
                steps += [_Step(shape, fraction, n, n * flops) for n in sorted(self.ladder.samples)]
        return steps

    def within_budget(self, steps: list[_Step]) -> tuple[list[_Step], list[Dropped]]:
        """Those that fit into `max_flops` together, when the dearest are left out; and those."""
        limit, kept, dropped = self.ladder.max_flops, list(steps), []
        while limit is not None and kept and self.flops(kept) > limit:
            dearest = max(kept, key=lambda step: (step.flops, step.name))
            reason = f"with it the ladder trains {self.flops(kept):.3g} FLOPs; max_flops is {limit:.3g}"
            dropped.append(Dropped(dearest.name, dearest.flops, reason))
            kept.remove(dearest)
        if not kept:
            cheapest = min(steps, key=lambda step: step.flops)
            raise UserError(f"max_flops {limit:.3g} is below the cheapest rung, {cheapest.name}: {cheapest.flops:.3g}")
        return kept, dropped

    def flops(self, steps: Iterable[_Step]) -> int:
        """Training FLOPs of these in all, what branches share counted once."""
        if self.ladder.schedule == "cosine":
            return sum(step.flops for step in steps)
        total, trunks = 0, dict[str, int]()
        for step in steps:
            flops, point = training_flops(self.models[step.shape], 1), self._branch_point(step)
            total += (step.samples - point) * flops
            trunks[step.trial] = max(trunks.get(step.trial, 0), point * flops)
        return total + sum(trunks.values())

    def trials(self, steps: list[_Step]) -> list[Trial]:
        """What a shape's steps are trained as."""
        if self.ladder.schedule == "cosine":
            rungs = [self._rung(step, self._config(step, step.name, schedule="cosine")) for step in steps]
            return [Trial(rung.name, (rung.config,), (rung,)) for rung in rungs]
        trunk = self._trunk(steps)
        rungs = [self._rung(step, self._branch(step, trunk)) for step in steps]
        return [Trial(steps[0].trial, (trunk, *(rung.config for rung in rungs)), tuple(rungs))]

    def _trunk(self, steps: list[_Step]) -> TrainConfig:
        points = [self._branch_point(step) for step in steps]
        config = self._config(steps[0], f"{steps[0].trial}-trunk", schedule="wsd", cooldown_samples=0)
        checkpoint = config.checkpoint.model_copy(update={"at_samples": tuple(points), "keep": 1})
        update = {"samples": points[-1], "evaluation": EvaluationConfig(), "checkpoint": checkpoint}
        return config.model_copy(update=update)

    def _branch(self, step: _Step, trunk: TrainConfig) -> TrainConfig:
        config = self._config(step, step.name, schedule="wsd", cooldown_samples=self._cooldown(step))
        source = f"{self.folder.rstrip('/')}/{trunk.name}@{self._branch_point(step)}"
        return config.model_copy(update={"branch_from": source})

    def _cooldown(self, step: _Step) -> int:
        return round(self.ladder.cooldown_share * step.samples)

    def _branch_point(self, step: _Step) -> int:
        """The last whole batch before the cooldown, so that the trunk's checkpoint is there and nowhere later."""
        batch = self._batch_size(step.shape)
        point = (step.samples - self._cooldown(step)) // batch * batch
        if point < max(batch, self.warmup):
            raise UserError(
                f"rung {step.name} is too short: of {step.samples:,} samples the last {self._cooldown(step):,} are "
                f"cooldown, which leaves no whole batch of {batch:,} after a warm-up of {self.warmup:,}"
            )
        return point

    def _batch_size(self, shape: str) -> int:
        return self.ladder.batch_sizes.get(shape, self.base.batch_size)

    def _rate(self, shape: str) -> float:
        narrower = _width(_model(self.base.model)) / _width(self.models[shape])
        return self.ladder.rates.get(shape, self.base.optimizer.lr * narrower**self.ladder.rate_exponent)

    def _config(self, step: _Step, name: str, **schedule: Any) -> TrainConfig:
        base = self.base
        optimizer = {"lr": self._rate(step.shape), "warmup_samples": self.warmup, **schedule}
        changes = {
            "name": name,
            "runs": self.folder,
            "model": self.models[step.shape].model_dump(),
            "data": base.data.model_dump() | {"fraction": step.fraction},
            "epochs": None,
            "samples": step.samples,
            "batch_size": self._batch_size(step.shape),
            "optimizer": base.optimizer.model_dump() | {"cooldown_samples": 0} | optimizer,
            # At its end, where the law is read; and the last checkpoint, not the best of several looks.
            "evaluation": base.evaluation.model_dump() | {"every_samples": None, "best": None},
            "tracking": base.tracking.model_dump() | {"register_as": None},
        }
        return TrainConfig.model_validate(base.model_dump() | changes)

    def _rung(self, step: _Step, config: TrainConfig) -> Rung:
        gmacs = forward_gmacs(self.models[step.shape])
        return Rung(step.name, step.shape, config, gmacs, step.flops, step.samples, step.fraction)


def _model(shape: str | ModelConfig) -> ModelConfig:
    return preset(shape) if isinstance(shape, str) else shape


def _width(model: ModelConfig) -> int:
    vision = model.vision
    return vision.width if isinstance(vision, VisionConfig) else vision.width * _STAGES_WIDEN
