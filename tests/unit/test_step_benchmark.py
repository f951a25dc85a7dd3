"""The step benchmark at a small shape: both sides do the same work, and the report has what it promises."""

import os

import numpy as np
import pytest

from benchmarks import step
from benchmarks.captions import captions
from benchmarks.config import BenchmarkConfig
from benchmarks.memory import extra_bytes
from rayclip.errors import UserError


def test_captions_have_the_lengths_of_the_web():
    tokens, lengths = captions(1000)
    assert np.median(lengths) == pytest.approx(11, abs=1)
    assert (lengths > 40).mean() == pytest.approx(0.05, abs=0.01)
    assert (lengths == 77).sum() >= 3
    assert (tokens[np.arange(1000), lengths - 1] == 49_407).all()
    assert ((tokens > 0) == (np.arange(77) < lengths[:, None])).all()


@pytest.mark.peers
@pytest.mark.parametrize(("precision", "micro_batch_size"), [("float32", None), ("bfloat16", None), ("float32", 3)])
def test_both_sides_give_the_same_losses(open_clip, monkeypatch, precision, micro_batch_size):
    monkeypatch.setattr(step, "extra_bytes", lambda *_: 1)
    config = BenchmarkConfig(
        name="step",
        preset="ViT-Nano/8@32",
        batch_size=8,
        micro_batch_size=micro_batch_size,
        repeats=2,
        precision=precision,
    )
    report = step.run(config)
    assert report["loss_relative_difference"] < (1e-6 if precision == "float32" else 0.02)
    assert report["loss_relative_difference_last"] < (1e-5 if precision == "float32" else 0.02)
    assert report["samples_per_s"] > 0 and 0 < report["mfu"] < 1 and report["ratio_vs_open_clip"] > 0


@pytest.mark.peers
def test_the_memory_of_a_side_is_that_of_its_own_process(open_clip):
    config = BenchmarkConfig(name="step", preset="ViT-Nano/8@32", batch_size=8)
    assert 10e6 < extra_bytes(step._prepare_memory, step.Ours, config) < 500e6


def _die() -> None:
    os._exit(9)


def test_a_process_that_dies_of_its_memory_is_one_line():
    with pytest.raises(UserError, match="memory could not be measured: its process has died"):
        extra_bytes(_die)
