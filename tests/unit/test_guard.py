"""Steps that go wrong: noticed, named, and handled by policy with the ledger exact, in one process and in two."""

import copy
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayclip.config import EmaConfig, GuardConfig, ModelConfig, OptimizerConfig
from rayclip.data.decode import CAUSES
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.distributed import rank
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import RunState, restore, write_checkpoint
from rayclip.training.ema import Ema
from rayclip.training.guard import Guard
from rayclip.training.loop import Hooks, LoopPlan, Trainer
from rayclip.training.optimizer import build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_SAMPLES, BATCH_SIZE, EPOCHS = 33, 6, 2
TOTAL = NUM_SAMPLES * EPOCHS


# Judging


def guard(losses=(), **settings):
    return Guard(GuardConfig(**{"spike_threshold": 6.0, "window": 16} | settings), list(losses))


def test_what_is_not_finite_is_trouble():
    assert guard().check(math.nan, math.nan).cause == "loss_not_finite"
    assert guard().check(math.inf, 1.0).cause == "loss_not_finite"
    anomaly = guard().check(2.5, math.inf)
    assert (anomaly.cause, anomaly.text) == ("gradient_not_finite", "the loss is 2.5 and the norm of its gradient inf")
    assert guard().check(2.5, 1e30) is None


def test_a_spike_is_measured_in_deviations_of_recent_losses():
    losses = [2.0, 2.2] * 8  # median 2.1, median deviation 0.1
    assert guard(losses).check(2.1 + 5.9 * 0.14826, 1.0) is None
    anomaly = guard(losses).check(2.1 + 6.1 * 0.14826, 1.0)
    assert anomaly.cause == "loss_spike"
    assert anomaly.text == "the loss is 3.004, 6.1 deviations above the median of the last steps, 2.1"
    assert guard(losses).check(0.1, 1.0) is None  # a fall is none
    assert guard(losses, spike_threshold=None).check(1e9, 1.0) is None
    assert guard(losses[:7]).check(1e9, 1.0) is None  # too few to know


def test_a_flat_loss_makes_no_spike_of_a_ripple():
    assert guard([1.0] * 16).check(1.05, 1.0) is None
    assert guard([1.0] * 16).check(1.07, 1.0).cause == "loss_spike"


def test_only_losses_without_trouble_are_remembered_and_only_the_last():
    losses = [2.0, 2.2] * 8
    watched = Guard(GuardConfig(spike_threshold=6.0, window=16), losses)
    for loss in (math.nan, 99.0, 2.15):
        watched.check(loss, 1.0)
    assert losses == [*([2.0, 2.2] * 8)[1:], 2.15]


def test_a_collapsed_scale_is_trouble_that_skipping_does_not_mend():
    anomaly = guard(min_logit_scale=2.0).check_scale(1.9)
    assert anomaly.text == "the logit scale has collapsed to 1.9"
    assert guard(min_logit_scale=2.0).check_scale(2.1) is None
    assert guard(min_logit_scale=None).check_scale(1.0) is None
    stops = {action: guard(action=action).stops_at(anomaly) for action in ("stop", "skip", "roll_back")}
    assert stops == {"stop": True, "skip": True, "roll_back": False}


# Runs


def make_spec(folder):
    manifest = Manifest.load(folder)
    end = EPOCHS * len(manifest)
    return StreamSpec(str(folder), manifest.digest, 5, end, 4, 16, 16, (0.5, 1.0), (0.75, 1.33))


def poison(model):
    """Make features of pictures with a white corner not a number."""
    encode = model.encode_image

    def encode_image(image_BHWC):
        bad = (image_BHWC[:, 0, 0] == 255).all(dim=1)
        return torch.where(bad[:, None], torch.nan, encode(image_BHWC))

    model.encode_image = encode_image


class Run:
    """Starts anew from its checkpoint, as a worker does; several of them may share a stream."""

    def __init__(self, folder, data, config, guard, evil=()):
        self.checkpoint, self.spec = folder / f"checkpoint-{rank()}", make_spec(data)
        self.config, self.evil = config, evil
        self.guard, self.notices, self.seen, self.losses = GuardConfig(**guard), [], [], []

    def start(self, crash_after=None, shares=1):
        torch.manual_seed(0)
        self.model = CLIP(self.config)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.ema, state = Ema(self.model, EmaConfig(half_life_samples=9)), RunState()
        if self.checkpoint.exists():
            state = restore(self.checkpoint, self.model, self.optimizer, self.ema)
        stream = Stream(self.spec, state.ledger)
        poison(self.model)
        hooks = Hooks(
            lambda metrics, state: self.losses.append(metrics["loss"]), lambda *_: None, lambda: {}, self._save,
            self.notices.append, lambda samples: map(self._mark, self._again(samples, shares)),
        )  # fmt: skip
        plan = LoopPlan(OptimizerConfig(lr=1e-3, max_grad_norm=1.0), TOTAL, 100, 15, None, 0.0, guard=self.guard)
        self.trainer = Trainer(plan, self.model, self.optimizer, state, stream.ledger(), hooks, self.ema)
        batches = list(stream.batches(BATCH_SIZE // shares))[rank() :: shares]
        return self.trainer.run(self._batches(batches, crash_after))

    def _again(self, samples, shares):
        return Stream(self.spec).again(samples, BATCH_SIZE // shares, rank(), shares)

    def _batches(self, batches, crash_after):
        for number, batch in enumerate(batches):
            if number == crash_after:
                raise ConnectionError
            yield self._mark(batch)

    def _mark(self, batch):
        evil = [sample in self.evil for sample in zip(batch["position"].tolist(), batch["row"].tolist(), strict=True)]
        batch["image"][:, 0, 0] = np.where(np.array(evil)[:, None], 255, 0)
        return batch

    def _save(self, state, metrics, seen):
        self.seen.append(seen)
        write_checkpoint(self.checkpoint, self.model, self.optimizer, state, {}, metrics, self.ema)

    def weights(self):
        return {**self.model.state_dict(), **{f"ema {n}": t for n, t in self.ema.state_dict().items()}}


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_samples, write_dataset):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, make_samples(NUM_SAMPLES))
    return folder


def nth(data, *numbers):
    """Samples by their place in the stream."""
    samples = [
        pair
        for batch in Stream(make_spec(data)).batches(BATCH_SIZE)
        for pair in zip(batch["position"].tolist(), batch["row"].tolist(), strict=True)
    ]
    return [samples[number] for number in numbers]


def check_ledger(run, state, left_out, shares=1):
    """Every sample stands in what was saved once, and is trained on or counted by its cause."""
    seen = np.concatenate(run.seen)
    assert len(np.unique(seen[:, :2], axis=0)) == len(seen) == TOTAL
    assert Counter(CAUSES[cause] for cause in seen[:, 2].tolist() if cause) == state.skipped == left_out
    assert state.samples_seen == TOTAL - sum(left_out.values())
    assert state.ledger == {"cursor": run.spec.end, "partial": {}}


def test_a_run_stops_and_names_the_batch(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config, {}, nth(data, 20))
    with pytest.raises(UserError, match=r"^the loss is nan: the batch holds 6 samples of stream positions [\d, ]+$"):
        run.start()
    assert all(tensor.isfinite().all() for tensor in run.weights().values())


def test_a_skipped_batch_changes_no_weight_and_is_counted(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config, {"action": "skip"}, nth(data, 20, 50))
    state = run.start()
    check_ledger(run, state, {"loss_not_finite": 12})
    assert state.interventions == 2 and state.steps == 9
    assert [notice.partition(":")[0] for notice in run.notices] == ["the loss is nan"] * 2
    assert all(notice.endswith("; skipped") for notice in run.notices)
    assert sum(math.isnan(loss) for loss in run.losses) == 2
    assert all(tensor.isfinite().all() for tensor in run.weights().values())


def test_a_run_that_skips_ends_the_same_after_crashes(tmp_path, data, tiny_config):
    settings = {"action": "skip", "spike_threshold": 1000.0, "window": 8}
    whole = Run(tmp_path / "whole", data, tiny_config, settings, nth(data, 20, 50))
    broken = Run(tmp_path / "broken", data, tiny_config, settings, nth(data, 20, 50))
    expected = whole.start()
    for crash_after in (4, 2, 3):
        with pytest.raises(ConnectionError):
            broken.start(crash_after)
    state = broken.start()
    for key, value in asdict(expected).items():
        assert key in ("train_time_s", "data_wait_s") or getattr(state, key) == value, key
    assert len(state.recent_losses) == 8
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, broken.weights()[name]), name


@pytest.mark.parametrize("evil", [(20,), (2,), (26, 28, 35), (65,), (12, 20, 44)])
def test_a_run_that_rolls_back_trains_on_all_others_once(tmp_path, data, tiny_config, evil):
    run = Run(tmp_path, data, tiny_config, {"action": "roll_back"}, nth(data, *evil))
    state = run.start()
    assert 0 < state.skipped["loss_not_finite"] <= BATCH_SIZE * len(evil)
    check_ledger(run, state, {"loss_not_finite": state.skipped["loss_not_finite"]})
    left_out = {tuple(sample[:2]) for sample in np.concatenate(run.seen).tolist() if sample[2]}
    assert left_out >= set(nth(data, *evil))
    assert state.interventions == len(run.notices) and "; went back to " in run.notices[0]
    assert all(tensor.isfinite().all() for tensor in run.weights().values())


def test_rolling_back_is_going_on_from_the_checkpoint_without_the_batch(tmp_path, data, tiny_config):
    """The weights are to the bit those of a run that is started anew from the checkpoint, and never gets the batch."""
    evil = nth(data, 26)
    rolled = Run(tmp_path / "rolled", data, tiny_config, {"action": "roll_back"}, evil)
    given = []
    mark = rolled._mark
    rolled._mark = lambda batch: given.append(copy.deepcopy(batch)) or mark(batch)
    rolled.start()
    at = next(n for n, batch in enumerate(given) if set(zip(batch["position"], batch["row"], strict=True)) & set(evil))
    # A checkpoint is made after 18 samples, the third batch; the fourth is undone, the fifth makes the trouble.
    assert at == 4
    plain = Run(tmp_path / "plain", data, tiny_config, {}, ())
    assert len(given) == 12
    plain._batches = lambda batches, crash_after: map(plain._mark, [*given[:3], *given[5:]])
    plain.start()
    for name, tensor in plain.weights().items():
        assert torch.equal(tensor, rolled.weights()[name]), name


def test_a_run_that_rolled_back_and_crashed_ends_with_an_exact_ledger(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config, {"action": "roll_back"}, nth(data, 26, 50))
    for crash_after in (5, 3):
        with pytest.raises(ConnectionError):
            run.start(crash_after)
    state = run.start()
    check_ledger(run, state, {"loss_not_finite": state.skipped["loss_not_finite"]})


def test_too_many_troubles_stop_the_run(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config, {"action": "skip", "max_interventions": 1}, nth(data, 20, 50))
    with pytest.raises(UserError, match=r"^the loss is nan: .*; guard\.max_interventions allows 1$"):
        run.start()


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config, {"action": "skip"})
    calls = Counter()

    def spoil(gradient):
        calls["backward"] += 1
        return gradient * (math.inf if calls["backward"] == 3 else 1)

    build = CLIP.__init__

    def build_spoiled(self, config):
        build(self, config)
        self.visual.proj.register_hook(spoil)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIP, "__init__", build_spoiled)
        state = run.start()
    check_ledger(run, state, {"gradient_not_finite": 6})


def test_a_collapsed_scale_rolls_back(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config, {"action": "roll_back", "min_logit_scale": 14.0})
    calls = Counter()
    clamp = CLIP.clamp_logit_scale_

    def collapse(self):
        clamp(self)
        calls["step"] += 1
        if calls["step"] == 5:
            self.logit_scale.data.fill_(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIP, "clamp_logit_scale_", collapse)
        state = run.start()
    check_ledger(run, state, {"logit_scale_collapsed": 6})
    assert run.model.logit_scale.exp() > 14


# Two processes


def run_worker(own_rank, folder, data, config, evil):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=own_rank, world_size=2)
    try:
        results = {}
        for action in ("stop", "skip", "roll_back"):
            run = Run(Path(folder) / action, data, ModelConfig.model_validate(config), {"action": action}, evil)
            error = ""
            try:
                run.start(shares=2)
            except UserError as stop:
                error = str(stop)
            results[action] = (run.weights(), run.trainer.state, run.seen, run.notices, error)
        torch.save(results, f"{folder}/{own_rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_do_as_one(tmp_path, data, tiny_config):
    evil = nth(data, 26)
    mp.spawn(run_worker, (str(tmp_path), str(data), tiny_config.model_dump(), evil), nprocs=2)
    workers = [torch.load(tmp_path / f"{number}.pt", weights_only=False) for number in range(2)]
    for action in ("stop", "skip", "roll_back"):
        (weights, state, seen, notices, error), other = (worker[action] for worker in workers)
        others, other_state, _, *told = other
        assert told == [notices, error]
        times = {"train_time_s": 0, "data_wait_s": 0}
        assert asdict(state) | times == asdict(other_state) | times
        for name, tensor in weights.items():
            assert torch.equal(tensor, others[name]), (action, name)
            assert tensor.isfinite().all()
        if action == "stop":
            assert error.startswith("the loss is nan: the batch holds 6 samples")
            continue
        alone = Run(tmp_path / f"alone-{action}", data, tiny_config, {"action": action}, evil)
        expected = alone.start()
        alone.seen = seen
        check_ledger(alone, state, {"loss_not_finite": 6})
        assert state.interventions == expected.interventions == 1
        assert notices == alone.notices
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone.weights()[name], rtol=0, atol=2e-3, msg=name)


def test_samples_that_came_before_come_again_in_equally_many_batches(data):
    stream = Stream(make_spec(data))
    whole = {key: np.concatenate([b[key] for b in stream.batches(5)]) for key in ("position", "row", "image", "tokens")}
    wanted = np.stack([whole["position"], whole["row"]], axis=1)[[3, 60, 7, 22, 23, 8, 41]]
    shares = [list(stream.again(wanted, 2, share, 3)) for share in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    found = {
        (int(batch["position"][i]), int(batch["row"][i])): batch["image"][i]
        for share in shares
        for batch in share
        for i in range(len(batch["row"]))
        if batch["position"][i] >= 0
    }
    assert found.keys() == {tuple(pair) for pair in wanted.tolist()}
    for position, row, image in zip(whole["position"].tolist(), whole["row"].tolist(), whole["image"], strict=True):
        if (position, row) in found:
            assert np.array_equal(found[position, row], image)
