"""The step benchmark at a small shape: both sides do the same work, and the report has what it promises."""

import numpy as np
import pytest
import torch

from jobs.benchmarks import step
from jobs.benchmarks.captions import captions
from jobs.benchmarks.flops import step_flops
from rayclip.config import BenchmarkConfig, ModelConfig, TextConfig, VisionConfig


def test_captions_have_the_lengths_of_the_web():
    tokens, lengths = captions(1000)
    assert np.median(lengths) == pytest.approx(11, abs=1)
    assert (lengths > 40).mean() == pytest.approx(0.05, abs=0.01)
    assert (lengths == 77).sum() >= 3
    assert (tokens[np.arange(1000), lengths - 1] == 49_407).all()
    assert ((tokens > 0) == (np.arange(77) < lengths[:, None])).all()


def test_a_steps_flops_are_those_of_its_matrices():
    config = ModelConfig(
        embed_dim=5,
        vision=VisionConfig(image_size=16, patch_size=8, width=8, layers=1, heads=2),
        text=TextConfig(context_length=16, vocab_size=50, width=4, layers=1, heads=2),
    )
    lengths = torch.tensor([3, 7], dtype=torch.int32)

    def last_block(tokens, sequences, pairs, width):
        """Keys and values of every token, all else of one token a sequence; attention is two products."""
        return 2 * tokens * width**2 + sequences * (2 + 8) * width**2 + 2 * pairs * width

    vision = 2 * 4 * 3 * 8**2 * 8 + last_block(2 * 5, 2, 2 * 5, 8) + 2 * 8 * 5
    text = last_block(3 + 7, 2, 3 + 7, 4) + 2 * 4 * 5
    assert step_flops(config, lengths) == 3 * 2 * (vision + text)


@pytest.mark.peers
@pytest.mark.parametrize(("precision", "micro_batch_size"), [("float32", None), ("bfloat16", None), ("float32", 3)])
def test_both_sides_give_the_same_losses(open_clip, monkeypatch, precision, micro_batch_size):
    monkeypatch.setattr(step, "_peak_memory", lambda side, config: 1)
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
    assert 10e6 < step._peak_memory(step.Ours, config) < 500e6
