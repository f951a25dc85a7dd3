"""One Ray for what runs in the tests' own process."""

import io

import pytest
import ray

from rayclip.orchestration.cluster.connection import connect


@pytest.fixture(scope="session", autouse=True)
def ray_session():
    """Ray with room for two train workers, a reader and one more, also where there are fewer cores."""
    connect(local_cpus=4)
    yield
    ray.shutdown()


class Terminal(io.StringIO):
    """What is written to it, as if on a terminal."""

    def isatty(self):
        return True


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def terminal():
    return Terminal()


@pytest.fixture
def clock_of(monkeypatch):
    """The clock of a module from now on, to be told the time."""

    def replace(module):
        clock = Clock()
        monkeypatch.setattr(module, "time", clock)
        return clock

    return replace
