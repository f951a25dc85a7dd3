"""Commands as users give them."""

import pytest
import ray


@pytest.fixture(scope="module", autouse=True)
def no_ray_left():
    """What a command has started in the tests' own process ends with the module: an idle Ray takes its share."""
    yield
    ray.shutdown()
