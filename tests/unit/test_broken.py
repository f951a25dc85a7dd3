"""Ten thousand samples, one of twenty broken or odd: each is decoded right, or has its cause."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from rayclip.data.decode import CAUSES
from rayclip.data.stream import Stream, StreamSpec
from tests.broken_corpus import BAD, CHUNK_SAMPLES, GONE, HALF, NUM_SAMPLES, ODD, SHARD_SAMPLES, SIDE, build_corpus

CLOSE = {"cmyk": 8.0, "palette": 12.0, "animated gif called png": 12.0}
"""Mean difference from the known pixels, in levels, where a format itself changes them; elsewhere 3, for JPEG."""


@pytest.fixture(scope="module")
def corpus():
    return build_corpus()


@pytest.fixture(scope="module")
def streamed(corpus, tmp_path_factory, write_dataset):
    """What the stream makes of each sample, by its number; crops are whole pictures, which have the model's size."""
    folder = tmp_path_factory.mktemp("broken")
    manifest = write_dataset(folder, corpus.samples, SHARD_SAMPLES, CHUNK_SAMPLES)
    (folder / f"{GONE:06}.tar").unlink()
    half = folder / f"{HALF:06}.tar"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    spec = StreamSpec(
        folder=str(folder), digest=manifest.digest, seed=0, end=len(manifest), window=8, image_size=SIDE,
        context_length=12, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0),
    )  # fmt: skip
    stream, by_number = Stream(spec), {}
    for batch in stream.batches(500):
        numbers = stream.order.chunks(batch["position"]) * CHUNK_SAMPLES + batch["row"]
        for i, number in enumerate(numbers.tolist()):
            assert number not in by_number
            by_number[number] = CAUSES[batch["cause"][i]], batch["image"][i], int(batch["num_tokens"][i])
    return by_number


def test_every_sample_comes_once_with_its_cause(corpus, streamed):
    assert sorted(streamed) == list(range(NUM_SAMPLES))
    assert Counter(corpus.kinds) == dict.fromkeys(BAD, 25) | dict.fromkeys(ODD, 10) | {"plain": 9650}
    assert sum(cause != "fine" for cause in corpus.causes) == 400
    assert {i: streamed[i][0] for i in streamed} == dict(enumerate(corpus.causes))
    assert all((tokens > 0) == (cause == "fine") == bool(image.any()) for cause, image, tokens in streamed.values())


@pytest.mark.parametrize("kind", [*ODD, "plain"])
def test_what_is_only_odd_has_the_pixels_that_pil_gives_it(corpus, streamed, kind):
    numbers = [i for i in range(NUM_SAMPLES) if corpus.kinds[i] == kind and corpus.causes[i] == "fine"][:10]
    assert len(numbers) == 10
    for i in numbers:
        (data,) = (file for extension, file in corpus.samples[i].items() if extension in ("jpg", "jpeg", "png", "webp"))
        pixels = streamed[i][1].astype(int)
        known = corpus.pixels[i].astype(int)
        if kind == "16-bit grey":  # which PIL would cut off at 255
            assert np.array_equal(pixels, np.repeat(known[..., :1], 3, axis=2))
            continue
        pil = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
        assert np.abs(pixels - pil).max() <= 2
        assert np.abs(pixels - known).mean() < CLOSE.get(kind, 3.0)
