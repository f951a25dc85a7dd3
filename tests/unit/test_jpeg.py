"""The fast way of JPEGs beside PIL's way: the same pixels, and the same files refused."""

import io
from functools import cache

import numpy as np
import pytest
from PIL import Image

from benchmarks.workload import jpegs
from rayclip.data.decode import BadSampleError, crop_image, crop_to_array, open_image, random_box
from rayclip.data.jpeg import crop_jpeg, jpeg_size, resize


def encoded(picture, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG", **({"quality": 90} | options))
    return file.getvalue()


def turned(picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, exif=exif)


@cache
def photos(side, count):
    return jpegs(side, count)


def picture(width=300, height=200):
    return Image.open(io.BytesIO(photos(500, 4)[0])).resize((width, height))


def whole(width, height):
    return 0, 0, width, height


@pytest.mark.parametrize("size", [16, 64, 224])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_crops_are_those_of_pil(size, subsampling):
    """On the box in whole pixels, beside PIL on the whole picture; finer where nothing is decoded small."""
    sharp = [encoded(Image.open(io.BytesIO(data)), subsampling=subsampling) for data in photos(500, 4)]
    draws = np.random.default_rng(0).random((len(sharp), 4))
    for data, draw in zip(sharp, draws, strict=True):
        box = tuple(round(edge / 8) * 8 for edge in random_box(500, 500, (0.3, 1.0), (3 / 4, 4 / 3), draw))
        box = (box[0], box[1], min(box[2], 496), min(box[3], 496))
        got = crop_jpeg(data, jpeg_size(data), box, size).astype(int)
        expected = open_image(data).convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
        difference = np.abs(got - np.asarray(expected).astype(int))
        assert difference.mean() < (0.1 if min(box[2] - box[0], box[3] - box[1]) < 2 * size else 1.5)


def test_the_mean_difference_to_pil_in_training_is_below_a_level():
    differences = []
    for data, draw in zip(photos(600, 8), np.random.default_rng(1).random((8, 4)), strict=True):
        box = random_box(600, 600, (0.9, 1.0), (3 / 4, 4 / 3), draw)
        slow = crop_to_array(open_image(data), box, 224).astype(int)
        differences.append(np.abs(crop_image(data, lambda *_, box=box: box, 224) - slow).mean())
    assert np.mean(differences) < 1


@pytest.mark.parametrize(("width", "height", "size"), [(224, 224, 224), (300, 250, 224), (100, 90, 224), (1, 3, 8)])
def test_resize_is_pils_bicubic(width, height, size):
    image = picture(width, height)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resize(np.asarray(image), size) - expected).max() <= 3
    assert np.abs(resize(np.asarray(image), size) - expected).mean() < 0.05


def test_a_crop_has_its_colours_side_by_side():
    """As the batch has them; planes would take twenty times longer to copy."""
    data = photos(500, 1)[0]
    for box in ((3, 5, 490, 470), whole(500, 500)):
        assert crop_jpeg(data, jpeg_size(data), box, 64).flags.c_contiguous


def test_a_grey_jpeg_is_decoded_as_rgb():
    data = encoded(picture().convert("L"))
    assert jpeg_size(data) == (300, 200)
    crop = crop_image(data, whole, 32)
    assert (crop == crop[..., :1]).all() and crop.shape == (32, 32, 3)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_rotated_picture_is_made_upright(orientation):
    """The tag tells how a viewer turns it: a picture stored by the inverse looks as the original does."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    data = turned(picture().transpose(back[orientation]), orientation)
    assert jpeg_size(data) is None
    seen = []
    crop = crop_image(data, lambda *size: seen.append(size) or whole(*size), 32).astype(int)
    assert seen == [(300, 200)]
    assert np.abs(crop - crop_image(encoded(picture()), whole, 32)).mean() < 2


def test_exif_data_that_turn_nothing_cost_nothing():
    assert jpeg_size(turned(picture(), 1)) == (300, 200)


def test_colours_for_print_are_left_to_pil():
    data = encoded(Image.new("CMYK", (40, 40)))
    assert jpeg_size(data) is None
    assert (crop_image(data, whole, 8) == 255).all()


def test_too_many_pixels_are_refused(monkeypatch):
    data = encoded(picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert jpeg_size(data) is None
    with pytest.raises(BadSampleError, match="image_too_large"):
        crop_image(data, whole, 8)


def test_damage_is_what_pil_calls_damage():
    """Cut anywhere, or with bytes overwritten: refused exactly where PIL refuses it, and else PIL's pixels."""
    data = encoded(picture(), progressive=False)
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(60):
        damaged = bytearray(data)
        if trial % 2:
            del damaged[int(generator.integers(2, len(data))) :]
        else:
            for place in generator.integers(0, len(data), 3):
                damaged[place] = generator.integers(256)
        try:
            image = open_image(bytes(damaged))
            slow = crop_to_array(image, whole(*image.size), 32).astype(int)
        except BadSampleError:
            slow = None
        try:
            fast = crop_image(bytes(damaged), whole, 32)
        except BadSampleError:
            fast = None
        if slow is None:
            refused += 1
            assert fast is None
        else:
            assert np.abs(fast - slow).mean() < 3
    assert refused > 20


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"\x89PNG", b"\xff\xd8Exif\0\0"])
def test_what_is_no_jpeg_is_left_to_pil(data):
    assert jpeg_size(data) is None
