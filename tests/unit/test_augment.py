"""Augmentation beside torchvision's, and its place in the stream: a function of the sample's identity."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayclip.data.augment import NUM_DRAWS, Augmentation, jitter, to_grey
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec

NEVER, HALF = 0.999, 0.5


def pixels(low=60, high=180, seed=0):
    return np.random.default_rng(seed).integers(low, high, (20, 20, 3), dtype=np.uint8)


def draws(**at):
    names = ("flip", "change", "brightness", "contrast", "saturation", "hue", "grey")
    return np.array([at.get(name, NEVER if name in ("flip", "change", "grey") else HALF) for name in names])


@pytest.mark.peers
@pytest.mark.parametrize("which", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("draw", [0.0, 0.2, 0.9])
def test_colours_change_as_torchvisions_do(open_clip, which, draw):
    from torchvision.transforms import functional

    place = ("brightness", "contrast", "saturation").index(which)
    strength = tuple(0.3 if i == place else 0.0 for i in range(4))
    given = np.array([draw if i == place else HALF for i in range(4)])
    change = getattr(functional, f"adjust_{which}")
    expected = change(torch.from_numpy(pixels()).permute(2, 0, 1), 1 + 0.3 * (2 * draw - 1)).permute(1, 2, 0).numpy()
    got = jitter(pixels(), strength, given)
    assert np.abs(got.astype(int) - expected).max() <= 2


def test_a_turned_hue_keeps_the_luma_and_a_whole_turn_changes_nothing():
    image = pixels(100, 150)
    half = jitter(image, (0, 0, 0, 0.5), np.array([HALF, HALF, HALF, 1.0])).astype(float)
    weights = [0.299, 0.587, 0.114]
    assert np.abs(half @ weights - image @ weights).max() < 1.5
    assert np.abs(half - image).mean() > 10
    assert np.abs(jitter(image, (0, 0, 0, 1.0), np.array([HALF, HALF, HALF, 1.0])).astype(int) - image).max() <= 1


def test_grey_is_pils_luma():
    from PIL import Image

    expected = np.asarray(Image.fromarray(pixels()).convert("L")).astype(int)
    assert np.abs(to_grey(pixels()).astype(int) - expected[..., None]).max() <= 1


def test_draws_below_the_share_change_the_picture():
    every = Augmentation(flip=0.5, colour_jitter=(0.4, 0.4, 0.4, 0.1), colour_jitter_share=0.5, grey=0.5)
    image = pixels()
    assert every.of(image, draws()) is image
    assert (every.of(image, draws(flip=0.4)) == image[:, ::-1]).all()
    assert (every.of(image, draws(grey=0.4)) == to_grey(image)).all()
    changed = every.of(image, draws(change=0.4, brightness=1.0))
    assert changed.mean() > 1.2 * image.mean()
    assert changed.dtype == np.uint8 and len(draws()) == NUM_DRAWS


@pytest.fixture(scope="module")
def spec(tmp_path_factory, make_samples, write_dataset):
    manifest: Manifest = write_dataset(tmp_path_factory.mktemp("augment"), make_samples(12), chunk_samples=4)
    return StreamSpec(manifest.folder, manifest.digest, 5, 40 * len(manifest), 2, 16, 12, (0.5, 1.0), (3 / 4, 4 / 3))


def everything(spec):
    return [np.concatenate(parts) for parts in zip(*(b.values() for b in Stream(spec).batches(64)), strict=True)]


def test_off_by_default_and_the_same_crops_when_on(spec):
    plain, *_ = everything(spec)
    flipped, *_ = everything(replace(spec, augmentation=Augmentation(flip=0.5)))
    same = (flipped == plain).all(axis=(1, 2, 3))
    mirrored = (flipped == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same | mirrored).all()
    assert 0.4 < mirrored.mean() < 0.6


def test_what_a_sample_looks_like_is_a_function_of_its_identity(spec):
    spec = replace(spec, augmentation=Augmentation(flip=0.5, colour_jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2))
    stream = Stream(spec)
    image, *_ = everything(spec)
    backwards = [stream.read(window)["image"] for window in reversed(stream.windows())]
    assert (np.concatenate(backwards[::-1]) == image).all()
    greys = (image == image[..., :1]).all(axis=(1, 2, 3))
    assert 0.12 < greys.mean() < 0.28
