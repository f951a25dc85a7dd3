"""What models cost, against the reference table: parameters in millions and GMACs of one pair, as it prints them."""

import pytest

from rayclip.config import ModelConfig
from rayclip.models.presets import preset
from rayclip.scaling.flops import forward_gmacs, image_cost, num_parameters, text_cost, training_flops

TABLE = {
    "RN50": ("102.01", "9.12"),
    "RN101": ("119.69", "12.79"),
    "RN50x4": ("178.30", "25.99"),
    "RN50x16": ("290.98", "81.55"),
    "RN50x64": ("623.26", "276.80"),  # the GMACs are our own count: the published table has none
    "ViT-B/32": ("151.28", "7.40"),
    "ViT-B/16": ("149.62", "20.57"),
    "ViT-L/14": ("427.62", "87.73"),
    "ViT-L/14@336": ("427.94", "197.76"),
}


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_gmacs_are_those_of_the_table(name):
    config = preset(name)
    assert (f"{num_parameters(config) / 1e6:.2f}", f"{forward_gmacs(config):.2f}") == TABLE[name]


def test_a_caption_costs_what_its_tokens_do():
    config = ModelConfig()
    width, layers, tokens = 512, 12, 13
    by_hand = layers * (12 * tokens * width**2 + 2 * tokens**2 * width) + width * 512
    assert text_cost(config, tokens).macs == by_hand
    assert text_cost(config, 77) == text_cost(config)
    lengths = [13, 13, 77, 5]
    text = sum(text_cost(config, length).macs for length in lengths)
    assert training_flops(config, 4, lengths) == 6 * (4 * image_cost(config).macs + text)
    assert training_flops(config, 4) == 6 * 4 * (image_cost(config).macs + text_cost(config).macs)


def test_the_papers_compute():
    """ViT-L/14, 12.8 billion pairs: 6.7e21 FLOPs."""
    assert training_flops(preset("ViT-L/14"), 12_800_000_000) == pytest.approx(6.7e21, rel=0.01)
