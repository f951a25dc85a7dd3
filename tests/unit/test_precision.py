"""bfloat16 towers: float32 where it matters, and gradients near those of float32."""

import copy

import pytest
import torch

from rayclip.models.clip import CLIP
from rayclip.models.presets import preset
from rayclip.training.loss import info_nce
from rayclip.training.precision import in_precision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs():
    torch.manual_seed(1)
    num_tokens = torch.tensor([5, 30, 9, 2, 9, 12, 20, 3], dtype=torch.int32)
    return torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8), torch.randint(1, 99, (8, 32)).int(), num_tokens


def backward(precision, pairs):
    torch.manual_seed(0)
    model = CLIP(preset("ViT-Micro/8@32"))
    outputs = in_precision(model, precision)(*pairs)
    loss = info_nce(*outputs, [8])
    loss.backward()
    return model, outputs, loss


def test_outputs_loss_and_gradients_are_float32_and_near(pairs):
    full, full_outputs, full_loss = backward("float32", pairs)
    half, outputs, loss = backward("bfloat16", pairs)
    assert {tensor.dtype for tensor in (*outputs, loss)} == {torch.float32}
    for actual, expected in zip(outputs, full_outputs, strict=True):
        torch.testing.assert_close(actual, expected, atol=0.01, rtol=0)
    assert not torch.equal(outputs[0], full_outputs[0])  # or nothing was computed in bfloat16
    assert loss.item() == pytest.approx(full_loss.item(), rel=0.01)
    gradients = dict(full.named_parameters())
    for name, parameter in half.named_parameters():
        expected = gradients[name].grad
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert (parameter.grad - expected).norm() <= 0.05 * expected.norm(), name


def test_the_residual_stream_stays_float32(pairs):
    model, dtypes = CLIP(preset("ViT-Micro/8@32")), set()
    for tower in (model.transformer, model.visual.transformer):
        for block in tower.resblocks:
            block.register_forward_hook(lambda module, inputs, output: dtypes.update((inputs[0].dtype, output.dtype)))
    in_precision(model, "bfloat16")(*pairs)
    assert dtypes == {torch.float32}


def test_float32_is_the_model_itself():
    model = CLIP(preset("ViT-Nano/8@32"))
    assert in_precision(model, "float32") is model
    wrapped = in_precision(copy.deepcopy(model), "bfloat16")
    assert [p.shape for p in wrapped.parameters()] == [p.shape for p in model.parameters()]
