"""Compiled blocks: the same numbers, and no recompilation for other captions."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from rayclip.config import ModelConfig, TextConfig, VisionConfig
from rayclip.models.clip import CLIP
from rayclip.models.transformer import compile_blocks
from rayclip.training.loss import info_nce
from rayclip.training.precision import in_precision

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=3, heads=2),
    text=TextConfig(context_length=32, vocab_size=100, width=16, layers=3, heads=2),
)


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_model():
    torch.manual_seed(0)
    return CLIP(CONFIG)


def make_batch(generator):
    size = int(torch.randint(2, 20, (), generator=generator))
    num_tokens = torch.randint(2, 33, (size,), generator=generator)
    tokens = torch.randint(1, 100, (size, 32), generator=generator)
    return torch.randint(0, 256, (size, 16, 16, 3), dtype=torch.uint8, generator=generator), tokens, num_tokens


def gradients(model, batch, precision="float32"):
    model.zero_grad()
    outputs = in_precision(model, precision)(*batch)
    info_nce(*outputs, [len(batch[0])]).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_lengths_and_batch_sizes_recompile_nothing():
    """One graph a tower for training and one for encoding, however many batches, blocks and lengths there are."""
    model, generator = make_model(), torch.Generator().manual_seed(1)
    compile_blocks(model, backend="aot_eager")
    for _ in range(3):
        gradients(model, make_batch(generator))
        with torch.no_grad():
            model(*make_batch(generator))
    assert counters["stats"]["unique_graphs"] == 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(40):
            gradients(model, make_batch(generator))
            with torch.no_grad():
                model(*make_batch(generator))
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_gradients_are_those_of_the_model(precision):
    model, generator = make_model(), torch.Generator().manual_seed(2)
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    for _ in range(3):
        batch = make_batch(generator)
        expected = gradients(model, batch, precision)
        for name, gradient in gradients(compiled, batch, precision).items():
            tolerance = 1e-5 if precision == "float32" else 0.03
            assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-7, name
