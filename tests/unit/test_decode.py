"""From files to pixels: the reference preprocess of open_clip, JPEGs decoded small, and where crops may lie."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rayclip.data.decode import (
    CAUSES,
    BadSampleError,
    crop_image,
    crop_to_array,
    eval_array,
    open_image,
    random_box,
    read_caption,
    read_image,
    to_rgb,
)

SCALE, RATIO = (0.3, 0.9), (3 / 4, 4 / 3)
fraction = st.floats(0, 1, exclude_max=True)


def noise(width, height, channels=3, seed=0):
    """Soft noise: coarse and finer structure, as pictures have."""
    generator = np.random.default_rng(seed)
    total = np.full((height, width, channels), 128.0)
    for step, strength in ((32, 40), (8, 15)):
        for channel in range(channels):
            small = generator.normal(size=(-(-height // step) + 1, -(-width // step) + 1)) * strength
            smooth = Image.fromarray(small.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(smooth)
    return np.clip(total, 0, 255).astype(np.uint8)


def encoded(array, file_format, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, file_format, **options)
    return file.getvalue()


def whole(*size):
    return 0, 0, *size


def opened(data):
    return read_image({"png": data})


# Evaluation


@pytest.mark.peers
@pytest.mark.parametrize("size", [16, 31, 32])
@pytest.mark.parametrize(
    ("width", "height"), [(32, 32), (33, 47), (101, 37), (37, 101), (17, 64), (31, 31), (5, 7), (300, 20), (1, 9)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_eval_array_is_the_reference_preprocess(open_clip, width, height, size, channels):
    array = noise(width, height, channels)
    image = Image.fromarray(array if channels == 3 else array[..., 0])
    transform = open_clip.transform.image_transform(size, is_train=False)
    mean, std = (
        np.array(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    expected = (transform(image).numpy() * std + mean) * 255
    got = eval_array(image, size)
    assert got.dtype == np.uint8
    assert got.shape == (size, size, 3)
    assert np.abs(got.transpose(2, 0, 1).astype(float) - expected).max() < 1.001


def test_eval_array_takes_the_middle():
    array = np.zeros((8, 24, 3), dtype=np.uint8)
    array[:, 8:16] = 200
    assert (eval_array(Image.fromarray(array), 8) == 200).all()


def test_eval_array_of_a_broken_picture_is_a_bad_sample():
    with pytest.raises(BadSampleError, match="image_undecodable"):
        eval_array(opened(encoded(noise(64, 64), "PNG")[:400]), 16)


# Transparency and modes


def test_what_is_transparent_goes_on_white():
    array = np.zeros((4, 4, 4), dtype=np.uint8)
    array[..., 0] = 200
    array[0, :, 3], array[1, :, 3], array[2:, :, 3] = 0, 51, 255
    got = np.asarray(to_rgb(opened(encoded(array, "PNG"))))
    assert (got[0] == 255).all()
    # A fifth of the colour and four fifths of white.
    assert np.abs(got[1].astype(int) - [244, 204, 204]).max() <= 1
    assert (got[2:] == [200, 0, 0]).all()


def test_a_transparent_palette_colour_goes_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    assert np.asarray(to_rgb(opened(file.getvalue()))).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    image = Image.new("I;16", (20, 20), 65535) if mode == "I;16" else Image.new("RGB", (20, 20), "white").convert(mode)
    image.save(file, "JPEG" if mode == "CMYK" else "PNG")
    for array in (eval_array(opened(file.getvalue()), 8), crop_to_array(opened(file.getvalue()), (0, 0, 20, 20), 8)):
        assert array.shape == (8, 8, 3)
        assert (array == 255).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_grey_is_scaled_and_not_cut_off(mode):
    grey = noise(40, 30, channels=1)[..., 0]
    deep = Image.frombytes(mode, (40, 30), (grey.astype(np.uint16) * 257).astype(">u2" if "B" in mode else "<u2"))
    file = io.BytesIO()
    deep.save(file, "TIFF" if "B" in mode else "PNG")
    assert np.array_equal(np.asarray(to_rgb(opened(file.getvalue()))), np.repeat(grey[..., None], 3, axis=2))


# Pictures that lie on their side, and damage


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_once_as_pil_turns_it(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(48, 32), file_format, exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(opened(data)), np.asarray(expected))
    for image in (opened(data), Image.open(io.BytesIO(data))):
        assert np.array_equal(eval_array(image, 16), eval_array(expected, 16))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0", b"Exif\0\0", b"Exif\0\0XX*\0\x08\0\0\0", b"Exif\0\0" + b"\xff" * 40]
)
def test_damaged_exif_data_turn_nothing_and_lose_nothing(exif):
    plain, data = (encoded(noise(48, 32), "JPEG", **more) for more in ({}, {"exif": exif}))
    assert exif in data
    assert np.array_equal(eval_array(opened(data), 16), eval_array(opened(plain), 16))
    assert np.array_equal(*(crop_image(file, whole, 16) for file in (plain, data)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "DDS"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL, of what it finds in damaged files
def test_whatever_is_damaged_there_are_pixels_or_a_bad_sample(file_format, monkeypatch):
    """PIL raises struct.error, RuntimeError and others here, each of which would end a run."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    exif = Image.Exif()
    exif[0x0112], exif[0x0128], exif[0x011A] = 6, 2, 300.0
    options = {"exif": exif.tobytes()} if file_format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    data = encoded(noise(24, 24), file_format, **options)
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = np.frombuffer(data, dtype=np.uint8).copy()
        # Headers are where most can go wrong.
        places = generator.integers(0, min(len(data), generator.choice([64, 200, len(data)])), generator.integers(1, 7))
        damaged[places] = generator.choice([0, 1, 127, 128, 255, *generator.integers(0, 256, 3)], len(places))
        for decode in (lambda data: eval_array(open_image(data), 8), lambda data: crop_image(data, whole, 8)):
            try:
                outcomes.add(decode(damaged.tobytes()).shape)
            except BadSampleError as error:
                outcomes.add(error.cause)
    assert outcomes - {"image_too_large", "image_too_thin"} == {(8, 8, 3), "image_undecodable"}


# Crops


@pytest.mark.parametrize("size", [16, 32, 61])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (251, 397), (640, 481), (33, 1000), (1000, 35), (20, 20)])
def test_a_jpeg_decoded_small_gives_the_crop_of_the_whole(width, height, size):
    data = encoded(noise(width, height), "JPEG", quality=95)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    generator = np.random.default_rng(3)
    for _ in range(6):
        box = random_box(width, height, (0.2, 1.0), RATIO, generator.random(4))
        expected = np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(float)
        got = crop_to_array(opened(data), box, size)
        assert np.abs(got - expected).mean() < 2.5


def test_a_crop_at_the_end_of_a_thin_jpeg_lies_where_it_was_asked_for():
    # Half of 33 pixels is decoded as 17: a scale taken from the width would move the crop by half its height.
    data = encoded(np.repeat(np.arange(1000, dtype=np.uint8)[:, None], 33, axis=1), "JPEG", quality=95)
    got = crop_to_array(opened(data), (0, 966, 33, 1000), 16).mean(axis=(1, 2))
    assert np.abs(got - np.linspace(967, 998, 16) % 256).max() < 3


def test_a_jpeg_is_decoded_no_larger_than_the_crop_needs():
    image = opened(encoded(noise(640, 480), "JPEG"))
    crop_to_array(image, (0, 0, 640, 480), 60)
    assert image.size == (80, 60)
    image = opened(encoded(noise(640, 480), "JPEG"))
    crop_to_array(image, (0, 0, 200, 100), 60)
    assert image.size == (640, 480)


def test_a_crop_is_what_pil_cuts_out():
    array = noise(40, 30)
    got = crop_to_array(opened(encoded(array, "PNG")), (7, 5, 23, 21), 16)
    assert (got == array[5:21, 7:23]).all()


@given(st.integers(1, 5000), st.integers(1, 5000), st.tuples(fraction, fraction, fraction, fraction))
def test_a_random_box_is_within_the_picture_and_its_limits(width, height, draws):
    left, upper, right, lower = random_box(width, height, SCALE, RATIO, np.array(draws))
    assert 0 <= left < right <= width * (1 + 1e-12)
    assert 0 <= upper < lower <= height * (1 + 1e-12)
    share = (right - left) * (lower - upper) / (width * height)
    aspect = (right - left) / (lower - upper)
    assert share <= SCALE[1] * (1 + 1e-9)
    if right - left < width * (1 - 1e-9) and lower - upper < height * (1 - 1e-9):  # nothing was cut off
        assert share >= SCALE[0] * (1 - 1e-9)
        assert RATIO[0] * (1 - 1e-9) <= aspect <= RATIO[1] * (1 + 1e-9)


def test_random_boxes_spread_over_scale_ratio_and_place():
    boxes = np.array(
        [random_box(100, 100, (0.1, 0.4), RATIO, draws) for draws in np.random.default_rng(0).random((4000, 4))]
    )
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert np.quantile(width * height / 1e4, [0, 0.5, 1]) == pytest.approx([0.1, 0.25, 0.4], abs=0.01)
    assert np.quantile(np.log(width / height), [0, 0.5, 1]) == pytest.approx(
        [-math.log(4 / 3), 0, math.log(4 / 3)], abs=0.02
    )
    for place in (boxes[:, 0] / (100 - width), boxes[:, 1] / (100 - height)):
        assert np.quantile(place, [0, 0.5, 1]) == pytest.approx([0, 0.5, 1], abs=0.02)


def test_the_whole_picture_is_kept_where_that_is_asked_for():
    assert random_box(40, 40, (1.0, 1.0), (1.0, 1.0), np.array([0.3, 0.9, 0.7, 0.2])) == (0, 0, 40, 40)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.tuples(fraction, fraction, fraction, fraction),
    st.sampled_from(["PNG", "JPEG"]),
)
def test_any_crop_of_a_sound_picture_can_be_cut(width, height, draws, file_format):
    data = encoded(noise(width, height), file_format)
    box = random_box(width, height, (0.01, 1.0), RATIO, np.array(draws))
    assert crop_to_array(opened(data), box, 9).shape == (9, 9, 3)


# Captions and files


def test_a_caption_is_stripped():
    assert read_caption({"txt": " a café\n".encode()}) == "a café"


@pytest.mark.parametrize(
    ("sample", "cause"),
    [({}, "no_caption"), ({"txt": b"\xe9"}, "caption_not_utf8"), ({"txt": b"\n"}, "caption_empty")],
)
def test_a_bad_caption_names_its_cause(sample, cause):
    with pytest.raises(BadSampleError) as caught:
        read_caption(sample)
    assert caught.value.cause == cause
    assert cause in CAUSES


def test_codes_of_causes_that_runs_have_kept_stay():
    """As samples.npy of the last release has them."""
    there = "fine chunk_unreadable sample_missing no_image image_unreadable image_undecodable no_caption "
    there += "caption_not_utf8 caption_empty loss_not_finite gradient_not_finite loss_spike logit_scale_collapsed"
    assert list(CAUSES[:13]) == there.split()


@pytest.mark.parametrize(("sample", "cause"), [({"txt": b"x"}, "no_image"), ({"jpg": b"x"}, "image_undecodable")])
def test_a_bad_picture_names_its_cause(sample, cause):
    with pytest.raises(BadSampleError) as caught:
        read_image(sample)
    assert caught.value.cause == cause
