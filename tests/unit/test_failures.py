"""Which failures of workers another start would meet again."""

import pytest
import torch
from mlflow.exceptions import MlflowException
from ray.exceptions import ActorDiedError, RayTaskError

from rayclip.io.s3 import StorageError
from rayclip.orchestration.train.failures import describe_failure


@pytest.mark.parametrize(
    "error",
    [
        StorageError("'s3://data/0.tar' cannot be read"),
        ConnectionResetError(),
        ActorDiedError(),
        MlflowException("the server is away"),
        torch.distributed.DistNetworkError("no route"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        RayTaskError("read", "a traceback", StorageError("away")),
    ],
)
def test_what_may_pass_is_tried_again(error):
    assert describe_failure(error) is None


def test_the_same_error_is_the_same_line():
    one, other = (describe_failure(ValueError(f"no <{object()!r}>\nhere")) for _ in range(2))
    assert one == other and one.startswith("ValueError: no <<object object at 0x")
    assert describe_failure(RayTaskError("read", "a traceback", KeyError("x"))) == "KeyError: 'x'"
