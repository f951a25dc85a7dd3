"""The loop on a small data set: crashes change no bit, hooks come when they are due, what is bad is counted."""

import copy
import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayclip.config import LossConfig, ModelConfig, OptimizerConfig
from rayclip.data.decode import CAUSES
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.models.presets import with_logit_bias
from rayclip.training import loop as loop_module
from rayclip.training import meter as meter_module
from rayclip.training.checkpoint import RunState, restore, write_checkpoint
from rayclip.training.loop import Hooks, LoopPlan, Trainer
from rayclip.training.meter import Meter
from rayclip.training.optimizer import build_optimizer
from rayclip.training.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZER = OptimizerConfig(lr=3e-3, warmup_samples=20, max_grad_norm=1.0)
NUM_SAMPLES, EPOCHS, BATCH_SIZE = 33, 2, 6
TOTAL = NUM_SAMPLES * EPOCHS


class CrashError(Exception):
    """The process is gone."""


def make_spec(folder):
    manifest = Manifest.load(folder)
    return StreamSpec(
        folder=str(folder),
        digest=manifest.digest,
        seed=5,
        end=EPOCHS * len(manifest),
        window=4,
        image_size=16,
        context_length=16,
        crop_scale=(0.5, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
    )


def make_plan(**changes):
    plan = {
        "optimizer": OPTIMIZER,
        "total_samples": TOTAL,
        "log_every": 20,
        "checkpoint_every": 15,
        "evaluate_every": None,
        "max_bad_fraction": 0.5,
    }
    return LoopPlan(**plan | changes)


class Run:
    """A run in this process: starts anew from the checkpoint it wrote last, as a worker does."""

    def __init__(self, folder, data, tiny_config, plan=None):
        self.checkpoint, self.spec, self.config = folder / "checkpoint", make_spec(data), tiny_config
        self.plan, self.calls, self.seen = plan or make_plan(), [], []

    def start(self, crash_after=None, seed=0, origin=None, stop_at=None):
        self.stop_at = stop_at
        torch.manual_seed(seed)
        self.model = CLIP(self.config)
        self.optimizer = build_optimizer(self.model, OPTIMIZER)
        state = RunState()
        if self.checkpoint.exists():
            state = restore(self.checkpoint, self.model, self.optimizer)
        elif origin:
            state = restore(origin, self.model, self.optimizer).branch()
        stream = Stream(self.spec, state.ledger)
        hooks = Hooks(
            self._step,
            self._log,
            self._evaluate,
            self._save,
            shard_of=Stream(self.spec).shard_at,
            wants_stop=lambda: self.stop_at is not None and self.trainer.state.samples_seen >= self.stop_at,
        )
        self.trainer = Trainer(self.plan, self.model, self.optimizer, state, stream.ledger(), hooks)
        return self.trainer.run(self._batches(stream, crash_after))

    def _batches(self, stream, crash_after):
        for number, batch in enumerate(stream.batches(BATCH_SIZE)):
            if number == crash_after:
                raise CrashError
            yield batch

    def _step(self, metrics, state):
        self.calls.append(("step", state.samples_seen, metrics))

    def _log(self, metrics, state):
        self.calls.append(("log", state.samples_seen, metrics))

    def _evaluate(self):
        self.calls.append(("evaluate", self.trainer.state.samples_seen, None))
        self.model.eval()
        return {"letters": {"top1": 0.5}}

    def _save(self, state, metrics, seen):
        self.calls.append(("save", state.samples_seen, copy.deepcopy(metrics)))
        self.seen.append(seen)
        write_checkpoint(self.checkpoint, self.model, self.optimizer, state, {}, metrics)

    def at(self, hook):
        return [samples for name, samples, _ in self.calls if name == hook]

    def everything(self):
        """All that a run leaves behind but its times."""
        tensors = dict(self.model.state_dict())
        for name, p in self.model.named_parameters():
            tensors |= {f"{name}|{slot}": value for slot, value in self.optimizer.state[p].items()}
        state = asdict(self.trainer.state) | {"train_time_s": 0, "data_wait_s": 0}
        return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()} | state


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_samples, write_dataset):
    folder = tmp_path_factory.mktemp("fine")
    write_dataset(folder, make_samples(NUM_SAMPLES))
    return folder


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory, make_samples, write_dataset):
    """Three of its 33 samples cannot be read."""
    folder = tmp_path_factory.mktemp("bad")
    samples = make_samples(NUM_SAMPLES)
    samples[4]["txt"] = b" "
    samples[11]["png"] = samples[11]["png"][:100]
    samples[20]["txt"] = b""
    write_dataset(folder, samples)
    return folder


BAD = {"caption_empty": 4, "image_undecodable": 2}


# Crashes


@pytest.mark.parametrize("crashes", [[4], [3], [10], [2, 9], [6, 1, 0, 4]])
def test_a_run_that_crashed_ends_with_the_same_bits(tmp_path, data, tiny_config, crashes):
    whole = Run(tmp_path / "whole", data, tiny_config)
    whole.start()
    broken = Run(tmp_path / "broken", data, tiny_config)
    for crash_after in crashes:
        with pytest.raises(CrashError):
            broken.start(crash_after)
    broken.start()
    assert broken.everything() == whole.everything()
    assert broken.trainer.state.samples_seen == TOTAL
    assert broken.trainer.state.ledger == {"cursor": broken.spec.end, "partial": {}}
    # The test would mean nothing if the weights did not depend on what was trained on.
    other = Run(tmp_path / "other", data, tiny_config, make_plan(optimizer=OptimizerConfig(lr=1e-3)))
    other.start()
    assert other.everything() != whole.everything()


def test_a_run_in_micro_batches_and_with_a_bias_goes_on_too(tmp_path, data, tiny_config):
    plan = make_plan(loss=LossConfig(kind="sigmoid"), micro_batch_size=4)
    whole = Run(tmp_path / "whole", data, with_logit_bias(tiny_config), plan)
    whole.start()
    assert whole.model.logit_bias.item() != -10
    broken = Run(tmp_path / "broken", data, with_logit_bias(tiny_config), plan)
    with pytest.raises(CrashError):
        broken.start(crash_after=5)
    broken.start()
    assert broken.everything() == whole.everything()


def test_a_crash_repeats_only_what_was_not_saved(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config)
    with pytest.raises(CrashError):
        run.start(crash_after=4)
    assert run.at("save") == [18]
    run.calls.clear()
    run.start()
    assert run.at("step")[0] == 18 + BATCH_SIZE
    identities = Counter(map(tuple, np.concatenate(run.seen)[:, :2].tolist()))
    assert set(identities.values()) == {1}
    assert len(identities) == TOTAL


# Branches


WSD = OPTIMIZER.model_copy(update={"schedule": "wsd"})


@pytest.mark.parametrize("cooldown", [24, 40])
def test_a_cooldown_that_branches_off_a_trunk_ends_with_the_bits_of_a_run_of_its_own(
    tmp_path, data, tiny_config, cooldown
):
    """The trunk goes on past the point, and the branch crashes before its first checkpoint and after it."""
    plan = make_plan(optimizer=WSD.model_copy(update={"cooldown_samples": cooldown}))
    single = Run(tmp_path / "single", data, tiny_config, plan)
    single.start()

    trunk = Run(
        tmp_path / "trunk", data, tiny_config, make_plan(optimizer=WSD, checkpoint_every=999, checkpoint_at=(24,))
    )
    with pytest.raises(CrashError):
        trunk.start(crash_after=7)
    assert (trunk.at("step")[-1], trunk.at("save")) == (42, [24])
    branch = Run(tmp_path / "branch", data, tiny_config, plan)
    for crash_after in (1, 4):
        with pytest.raises(CrashError):
            branch.start(crash_after, seed=9, origin=trunk.checkpoint)
    state = branch.start(seed=9, origin=trunk.checkpoint)
    assert branch.at("save")[0] == 30
    assert state.branched_at == 24
    assert branch.everything() == single.everything() | {"branched_at": 24}
    # The cooldown matters: without it the weights are others.
    endless = Run(tmp_path / "endless", data, tiny_config, make_plan(optimizer=WSD))
    endless.start()
    assert endless.everything() != single.everything()

    identities = Counter(map(tuple, np.concatenate(trunk.seen + branch.seen)[:, :2].tolist()))
    assert set(identities.values()) == {1}
    assert len(identities) == TOTAL


def test_a_branch_counts_its_own_time():
    trunk = RunState(
        samples_seen=90, steps=9, train_time_s=5.0, data_wait_s=1.0, skipped={"no_image": 3}, ledger={"cursor": 8}
    )
    branch = trunk.branch()
    assert asdict(branch) == asdict(trunk) | {"branched_at": 90, "train_time_s": 0, "data_wait_s": 0}
    assert branch.samples_consumed == 93


# Hooks


def test_hooks_are_called_where_they_are_due(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config, make_plan(evaluate_every=35))
    state = run.start()
    assert run.at("step") == list(range(6, 67, 6))
    assert run.at("log") == [24, 42, 60]
    assert run.at("evaluate") == [36, 66]
    assert run.at("save") == [18, 30, 36, 48, 60, 66]
    measured = {samples: metrics for name, samples, metrics in run.calls if name == "save"}
    assert [samples for samples, metrics in measured.items() if metrics] == [36, 66]
    assert state.steps == 11
    assert run.model.training


def test_what_is_measured_beside_training_changes_nothing_but_who_measures(tmp_path, data, tiny_config):
    """All but the last; a checkpoint that is only saved is told from one that is still to be measured."""
    runs = [
        Run(tmp_path / str(beside), data, tiny_config, make_plan(evaluate_every=35, evaluate_asynchronously=beside))
        for beside in (False, True)
    ]
    for run in runs:
        run.start()
    on_workers, beside = runs
    assert beside.at("evaluate") == [66]
    assert beside.at("save") == on_workers.at("save") == [18, 30, 36, 48, 60, 66]
    saved = [metrics for name, _, metrics in beside.calls if name == "save"]
    assert saved == [{}, {}, None, {}, {}, {"letters": {"top1": 0.5}}]
    assert beside.everything() == on_workers.everything()


def test_checkpoints_are_made_where_they_are_asked_for(tmp_path, bad_data, data, tiny_config):
    """At the first step at or after each, several in one step making one; samples that could not be read count too."""
    plan = make_plan(checkpoint_every=1000, checkpoint_at=(1, 2, 18, 19, 40, 70))
    run = Run(tmp_path / "fine", data, tiny_config, plan)
    run.start()
    assert run.at("save") == [6, 18, 24, 42, 66]
    bad = Run(tmp_path / "bad", bad_data, tiny_config, plan)
    bad.start()
    given = np.cumsum([len(seen) for seen in bad.seen]).tolist()
    assert given == [6, 18, 24, 42, 66]


def test_steps_are_told_their_loss_rate_and_scale(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config)
    run.start()
    before = 0
    for name, samples, metrics in run.calls:
        if name == "step":
            assert metrics["learning_rate"] == pytest.approx(learning_rate(before, OPTIMIZER, TOTAL))
            assert 0 < metrics["loss"] < 5
            assert 1 <= metrics["logit_scale"] <= 100
            assert 0 < metrics["rates"]["samples_per_s"] < 1e6
            assert 0 <= metrics["rates"]["data_wait_share"] <= 1
            before = samples
        elif name == "log":
            assert metrics.keys() == {
                "loss",
                "learning_rate",
                "logit_scale",
                "grad_norm",
                "samples_per_s",
                "data_wait_share",
            }


def test_a_run_without_any_batch_is_measured_and_saved_once(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config)
    model = CLIP(tiny_config)
    calls = []
    hooks = Hooks(
        lambda *_: calls.append("step"),
        lambda *_: calls.append("log"),
        lambda: calls.append("evaluate") or {},
        lambda *_: calls.append("save"),
    )
    ledger = Stream(run.spec).ledger()
    Trainer(make_plan(), model, build_optimizer(model, OPTIMIZER), RunState(), ledger, hooks).run([])
    assert calls == ["evaluate", "save"]


def test_a_finished_run_that_starts_again_makes_nothing_anew(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config)
    run.start()
    before = run.everything()
    run.calls.clear()
    run.start(seed=3)
    assert run.calls == []
    assert run.everything() == before


def test_padding_is_passed_over(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config)
    run.start()
    state = run.trainer.state
    run.calls.clear()
    weights = run.everything()
    run.trainer.run([Stream(run.spec).padding(3)])
    assert run.at("save") == run.at("evaluate") == run.at("log") == []
    assert run.everything() == weights
    assert state.samples_seen == TOTAL


# Bad samples


def test_skipped_samples_are_counted_exactly(tmp_path, bad_data, tiny_config):
    run = Run(tmp_path, bad_data, tiny_config)
    for crash_after in (5, 4):
        with pytest.raises(CrashError):
            run.start(crash_after)
    state = run.start()
    assert state.skipped == BAD
    assert list(state.skipped) == ["caption_empty", "image_undecodable"]
    assert state.samples_seen == TOTAL - 6
    assert state.ledger == {"cursor": run.spec.end, "partial": {}}
    seen = np.concatenate(run.seen)
    assert len(np.unique(seen[:, :2], axis=0)) == len(seen) == TOTAL
    assert Counter(CAUSES[cause] for cause in seen[:, 2].tolist()) == Counter(BAD | {"fine": TOTAL - 6})


def test_bad_samples_are_borne_up_to_the_fraction(tmp_path, bad_data, tiny_config):
    Run(tmp_path / "a", bad_data, tiny_config, make_plan(max_bad_fraction=6 / TOTAL + 1e-9)).start()
    with pytest.raises(UserError) as caught:
        Run(tmp_path / "b", bad_data, tiny_config, make_plan(max_bad_fraction=5 / TOTAL + 1e-9)).start()
    message = str(caught.value)
    assert message.startswith("6 of ")
    # The worst shards of the whole run, in which there were checkpoints.
    assert "(caption_empty 4, image_undecodable 2; most in 000000.tar 4, 000001.tar 2)" in message
    assert message.endswith("data.max_bad_fraction allows 0.0757576")


def test_bad_samples_before_a_restart_count_too(tmp_path, bad_data, tiny_config):
    run = Run(tmp_path, bad_data, tiny_config, make_plan(max_bad_fraction=5 / TOTAL + 1e-9))
    for _ in range(20):
        try:
            run.start(crash_after=4)
        except CrashError:
            continue
        except UserError as error:
            assert "6 of " in str(error) and "(caption_empty 4, image_undecodable 2; most in" in str(error)
            return
    pytest.fail("the run was not stopped")


def test_no_bad_sample_is_allowed_where_none_is_wanted(tmp_path, bad_data, data, tiny_config):
    with pytest.raises(UserError, match=r"^1 of \d+ samples could not be read"):
        Run(tmp_path / "a", bad_data, tiny_config, make_plan(max_bad_fraction=0.0)).start()
    Run(tmp_path / "b", data, tiny_config, make_plan(max_bad_fraction=0.0)).start()


# Time


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""

    class Clock:
        now = 50.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    for module in (meter_module, loop_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_time_is_split_into_training_and_waiting(clock):
    def batches():
        for wait_s in (2.0, 1.0, 4.0):
            clock.now += wait_s
            yield {}
        clock.now += 100  # finding out that there is no more

    state = RunState(samples_seen=10, train_time_s=1000.0, data_wait_s=500.0)
    meter, shown = Meter(state), []
    for _ in meter.timed(batches()):
        clock.now += 3
        state.samples_seen += 30
        shown.append(meter.rates())
        if len(shown) == 2:
            clock.now += 50
            meter.pause(50)
    # The wait for the first batch is the stream's start, and no part of either.
    assert state.data_wait_s == 500 + 5
    assert state.train_time_s == 1000 + 5 + 9
    assert shown[0] == pytest.approx({"samples_per_s": 30 / 3, "data_wait_share": 0})
    assert shown[1] == pytest.approx({"samples_per_s": 60 / 7, "data_wait_share": 1 / 7})
    assert shown[2] == pytest.approx({"samples_per_s": 90 / 14, "data_wait_share": 5 / 14})


def test_a_new_window_forgets_the_steps_before(clock):
    state = RunState()
    meter, shown = Meter(state), []
    for _ in meter.timed([{}] * 4):
        clock.now += 2 + state.samples_seen
        state.samples_seen += 10
        shown.append(meter.rates()["samples_per_s"])
        if len(shown) == 2:
            meter.start_window()
    assert shown == pytest.approx([10 / 2, 20 / 14, 10 / 22, 20 / 54])


def test_evaluations_and_checkpoints_are_no_training_time(clock, data, tiny_config):
    model, spec, saved = CLIP(tiny_config), make_spec(data), []

    def batches(stream):
        for batch in stream.batches(BATCH_SIZE):
            clock.now += 1
            yield batch

    def pass_time(seconds):
        clock.now += seconds
        return {}

    def save(state, metrics, seen):
        saved.append((state.data_wait_s, state.train_time_s))
        clock.now += 500

    hooks = Hooks(lambda *_: pass_time(3), lambda *_: None, lambda: pass_time(1000), save)
    stream = Stream(spec)
    plan = make_plan(evaluate_every=36, checkpoint_every=18)
    trainer = Trainer(plan, model, build_optimizer(model, OPTIMIZER), RunState(), stream.ledger(), hooks)
    state = trainer.run(batches(stream))
    assert len(saved) == 4
    assert (state.data_wait_s, state.train_time_s) == (10, 10 + 11 * 3)


def test_a_checkpoint_knows_the_time_of_the_step_it_follows(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config)
    with pytest.raises(CrashError):
        run.start(crash_after=4)
    saved = restore(run.checkpoint, run.model, run.optimizer)
    assert 0 <= saved.data_wait_s < saved.train_time_s
    run.start()
    assert saved.train_time_s < run.trainer.state.train_time_s
    assert saved.data_wait_s < run.trainer.state.data_wait_s < run.trainer.state.train_time_s


# Two processes


def run_worker(rank, folder, data, bad_data, config):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        results = {}
        for name, path, fraction in (("fine", data, 0.0), ("bad", bad_data, 0.5), ("stopped", bad_data, 0.0)):
            torch.manual_seed(0)
            model = CLIP(ModelConfig.model_validate(config))
            optimizer = build_optimizer(model, OPTIMIZER)
            stream, saved, losses = Stream(make_spec(path)), [], []
            batches = list(stream.batches(BATCH_SIZE // 2))[rank::2]
            hooks = Hooks(
                lambda metrics, state, losses=losses: losses.append(metrics["loss"]),
                lambda metrics, state: None,
                lambda: {},
                lambda state, metrics, seen, saved=saved: saved.append((state.samples_seen, seen.tolist())),
            )
            trainer = Trainer(
                make_plan(max_bad_fraction=fraction), model, optimizer, RunState(), stream.ledger(), hooks
            )
            error = ""
            try:
                trainer.run(batches)
            except UserError as stop:
                error = str(stop)
            state = asdict(trainer.state) | {"train_time_s": 0, "data_wait_s": 0}
            results[name] = {
                "weights": model.state_dict(), "state": state, "saved": saved, "losses": losses, "error": error
            }  # fmt: skip
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory, data, bad_data, tiny_config):
    """What each of two gloo processes came to, which share the batches of one."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(run_worker, (str(folder), str(data), str(bad_data), tiny_config.model_dump()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["fine", "bad"])
def test_two_processes_train_what_one_does(tmp_path, workers, data, bad_data, tiny_config, name):
    run = Run(tmp_path, {"fine": data, "bad": bad_data}[name], tiny_config)
    run.start()
    losses = [metrics["loss"] for hook, _, metrics in run.calls if hook == "step"]
    first, second = (worker[name] for worker in workers)
    assert first["state"] == second["state"]
    assert first["state"] == asdict(run.trainer.state) | {"train_time_s": 0, "data_wait_s": 0}
    assert first["saved"] == second["saved"]
    assert [samples for samples, _ in first["saved"]] == run.at("save")
    for (_, got), expected in zip(first["saved"], run.seen, strict=True):
        assert sorted(got) == sorted(expected.tolist())
    for worker in (first, second):
        assert worker["losses"] == pytest.approx(losses, rel=1e-3)
        assert not any(math.isnan(loss) for loss in worker["losses"])
        for key, weight in worker["weights"].items():
            assert torch.equal(weight, first["weights"][key])
            torch.testing.assert_close(weight, run.model.state_dict()[key], rtol=0, atol=1e-3, msg=key)


def test_all_processes_are_stopped_by_one_bad_sample(workers):
    first, second = (worker["stopped"]["error"] for worker in workers)
    assert first == second
    assert "samples could not be read" in first


@pytest.mark.parametrize("stop_at", [0, 12, 30, TOTAL - 1])
def test_a_stop_saves_the_step_it_comes_in_and_the_rest_ends_with_the_same_bits(tmp_path, data, tiny_config, stop_at):
    whole = Run(tmp_path / "whole", data, tiny_config)
    whole.start()
    stopped = Run(tmp_path / "stopped", data, tiny_config)
    state = stopped.start(stop_at=stop_at)
    reached = state.samples_seen
    assert stop_at < reached <= max(stop_at, 0) + 2 * BATCH_SIZE
    assert stopped.at("save")[-1] == reached, "nothing that was trained is lost"
    stopped.start()
    assert stopped.everything() == whole.everything()
    assert Counter(map(tuple, np.concatenate(stopped.seen).tolist())) == Counter(
        map(tuple, np.concatenate(whole.seen).tolist())
    )
