"""The moving average of the weights: its formula in float64, checkpoints to the bit, and its use as a model."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rayclip.config import EmaConfig, OptimizerConfig, TrainConfig
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import RunState, load_model, restore, write_checkpoint
from rayclip.training.ema import Ema
from rayclip.training.loop import Hooks, LoopPlan, Trainer
from rayclip.training.optimizer import build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_SAMPLES, BATCH_SIZE = 20, 4


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_it_is_the_formula_at_any_batch_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = Ema(model, EmaConfig(half_life_samples=100))
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for num_samples in (32, 32, 7, 250, 32, 1):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.randint(1, 9, tensor.shape))
        ema.update(num_samples)
        for name, tensor in model.state_dict().items():
            decay = 2 ** (-num_samples / 100) if tensor.is_floating_point() else 0
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, average in ema.state_dict().items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert ema.state_dict()["1.num_batches_tracked"].dtype == torch.int64


def test_half_of_what_was_is_left_after_a_half_life():
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    for steps in (1, 4, 64):
        ema = Ema(model, EmaConfig(half_life_samples=64))
        changed = copy.deepcopy(model)
        ema._model = changed
        nn.init.zeros_(changed.weight)
        for _ in range(steps):
            ema.update(64 // steps)
        torch.testing.assert_close(ema.state_dict()["weight"], torch.full((2, 2), 0.5))


def test_the_model_has_the_average_inside_and_its_own_weights_after(tiny_config):
    model = CLIP(tiny_config)
    ema = Ema(model, EmaConfig(half_life_samples=10))
    average = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="in the middle"), ema.in_place():
        assert_equal(model.state_dict(), average)
        assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))
        raise RuntimeError("in the middle")
    assert_equal(model.state_dict(), own)
    assert_equal(ema.state_dict(), average)


class Run:
    """Starts anew from its checkpoint, as a worker does."""

    def __init__(self, folder, data, tiny_config):
        manifest = Manifest.load(data)
        self.checkpoint, self.config, self.raw = folder / "checkpoint", tiny_config, []
        self.spec = StreamSpec(str(data), manifest.digest, 5, len(manifest), 4, 16, 16, (0.5, 1.0), (0.75, 1.33))

    def start(self, crash_after=None):
        torch.manual_seed(0)
        self.model = CLIP(self.config)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.ema, state = Ema(self.model, EmaConfig(half_life_samples=8)), RunState()
        if self.checkpoint.exists():
            state = restore(self.checkpoint, self.model, self.optimizer, self.ema)
        stream = Stream(self.spec, state.ledger)
        hooks = Hooks(lambda *_: None, lambda *_: None, lambda: {}, self._save)
        plan = LoopPlan(OptimizerConfig(lr=1e-2), NUM_SAMPLES, 100, 8, None, 0.0)
        trainer = Trainer(plan, self.model, self.optimizer, state, stream.ledger(), hooks, self.ema)
        trainer.run(self._batches(stream, crash_after))

    def _batches(self, stream, crash_after):
        for number, batch in enumerate(stream.batches(BATCH_SIZE)):
            if number == crash_after:
                raise ConnectionError
            yield batch

    def _save(self, state, metrics, seen):
        self.raw.append(copy.deepcopy(self.model.state_dict()))
        model = {"model": self.config.model_dump(mode="json")}
        write_checkpoint(self.checkpoint, self.model, self.optimizer, state, model, metrics, self.ema)


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_samples, write_dataset):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, make_samples(NUM_SAMPLES))
    return folder


def test_a_run_that_crashed_ends_with_the_same_average(tmp_path, data, tiny_config):
    whole, broken = Run(tmp_path / "whole", data, tiny_config), Run(tmp_path / "broken", data, tiny_config)
    whole.start()
    for crash_after in (3, 2):
        with pytest.raises(ConnectionError):
            broken.start(crash_after)
    broken.start()
    assert_equal(broken.ema.state_dict(), whole.ema.state_dict())
    assert_equal(broken.model.state_dict(), whole.model.state_dict())
    assert not torch.equal(whole.ema.state_dict()["text_projection"], whole.model.state_dict()["text_projection"])


def test_the_loop_follows_every_step(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config)
    torch.manual_seed(0)
    expected = CLIP(tiny_config).text_projection.detach().double()
    steps = []

    class Watched(Ema):
        def update(self, num_samples):
            steps.append((num_samples, run.model.text_projection.detach().clone()))
            super().update(num_samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Ema", Watched)
        run.start()
    assert [n for n, _ in steps] == [BATCH_SIZE] * (NUM_SAMPLES // BATCH_SIZE)
    for n, weight in steps:
        expected = weight.double() + (expected - weight) * 2 ** (-n / 8)
    torch.testing.assert_close(run.ema.state_dict()["text_projection"].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_average_can_be_loaded_as_a_model(tmp_path, data, tiny_config):
    run = Run(tmp_path, data, tiny_config)
    run.start()
    assert_equal(load_model(run.checkpoint).state_dict(), run.model.state_dict())
    assert_equal(load_model(run.checkpoint, ema=True).state_dict(), run.ema.state_dict())
    (run.checkpoint / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no ema\.safetensors: its run kept no moving average"):
        load_model(run.checkpoint, ema=True)


def test_the_best_checkpoint_may_be_picked_by_the_average():
    settings = {
        "name": "run", "model": "ViT-Nano/8@32", "data": {"path": "x"}, "epochs": 1, "batch_size": 4,
        "evaluation": {"tasks": {"letters": {"kind": "zero_shot", "path": "y"}}, "best": "letters.ema.top1"},
    }  # fmt: skip
    assert TrainConfig.model_validate(settings | {"ema": {"half_life_samples": 5}}).ema.half_life_samples == 5
    with pytest.raises(ValidationError, match=r"'letters\.ema\.top1' is not measured; measured: letters\.top1,"):
        TrainConfig.model_validate(settings)
