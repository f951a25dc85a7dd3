"""The loss of a global batch and its gradient, with all pairs of a rank in the towers at once or some at a time.

Some at a time, the gradient is that of the whole batch all the same, every negative included (GradCache, Gao et al.,
2021, arXiv:2101.06983): first the features of all micro-batches, without a graph; then the loss, which gives the
gradient of the features; then each micro-batch anew, with a graph that takes its features' gradient to the weights.
A step holds what the towers keep of one micro-batch, and the features; it costs a second forward pass.

Exact for towers that treat samples independently. Batch norm in training takes its statistics from a micro-batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayclip.config import LossConfig
from rayclip.distributed import world_size
from rayclip.training.loss import contrastive_loss

Inputs = tuple[Tensor, Tensor, Tensor]
"""Pictures, tokens and their numbers, on the host: what a model is called with."""

RandomState = tuple[Tensor, Tensor | None]
"""Of the host, and of the GPU where there is one."""


def forward_backward(
    net: nn.Module,
    inputs: Inputs,
    batch_sizes: list[int],
    device: torch.device,
    loss: LossConfig,
    micro_batch_size: int | None = None,
) -> Tensor:
    """Add the gradient of the whole batch's loss to the parameters; -> this rank's share of the loss, a scalar.

    `net` is the model, or the model wrapped for data parallelism; `batch_sizes` holds every rank's number of pairs,
    of which at most `micro_batch_size` are in the towers at once.
    """
    # All ranks take the same way, also one with few pairs: the ways have their collectives in different orders.
    if micro_batch_size is not None and micro_batch_size < max(batch_sizes):
        return _in_micro_batches(net, inputs, batch_sizes, device, loss, micro_batch_size)
    return _backward(_outputs(net, inputs, device), batch_sizes, loss)


def _in_micro_batches(
    net: nn.Module, inputs: Inputs, batch_sizes: list[int], device: torch.device, loss: LossConfig, size: int
) -> Tensor:
    # A rank without pairs has one micro-batch, of none.
    micro_batches: list[Inputs] = list(zip(*(tensor.split(size) for tensor in inputs), strict=True))
    random_states, outputs = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            random_states.append(_random_state(device))
            outputs.append(_outputs(net, micro_batch, device))
    images, texts, *scale_and_bias = zip(*outputs, strict=True)
    leaves = [torch.cat(images), torch.cat(texts), *(tensors[0].detach() for tensors in scale_and_bias)]
    share = _backward([leaf.requires_grad_() for leaf in leaves], batch_sizes, loss)
    image_grad, text_grad, *other_grads = (leaf.grad for leaf in leaves)
    for number, grads in enumerate(zip(image_grad.split(size), text_grad.split(size), strict=True)):
        last = number == len(micro_batches) - 1
        # Ranks sum their gradients up with the last micro-batch, which is the one that the scale's gradient goes with.
        with nullcontext() if last else _without_sync(net):
            with _replayed(random_states[number], device):
                again = _outputs(net, micro_batches[number], device)
            given = [*grads, *other_grads] if last else grads
            # A tower that is locked has features without a graph.
            pairs = [(tensor, grad) for tensor, grad in zip(again, given, strict=False) if tensor.requires_grad]
            tensors, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(tensors, gradients)
    return share


def _outputs(net: nn.Module, inputs: Inputs, device: torch.device) -> tuple[Tensor, ...]:
    image, tokens, num_tokens = inputs
    outputs: tuple[Tensor, ...] = net(
        image.to(device, non_blocking=True), tokens.to(device, non_blocking=True), num_tokens
    )
    return outputs


def _backward(outputs: Sequence[Tensor], batch_sizes: list[int], loss: LossConfig) -> Tensor:
    share = contrastive_loss(outputs, batch_sizes, loss)
    # Data parallelism averages gradients over ranks; shares of one loss must be summed.
    (share * world_size()).backward()
    return share.detach()


def _without_sync(net: nn.Module) -> AbstractContextManager[None]:
    return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """What is drawn inside is what was drawn from `state` on; afterwards all is as before."""
    on_host, on_device = state
    with torch.random.fork_rng([] if on_device is None else [device]):
        torch.set_rng_state(on_host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        yield
