"""Pictures from strangers: the reference's pixels, or an error that says what is wrong, whatever the bytes are."""

import base64
import binascii
import io
import pickle
import random
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rayclip.serve import images as images
from rayclip.serve.avif import frame_sizes
from rayclip.serve.images import (
    MAX_ASPECT,
    MAX_JPEG_SCANS,
    RequestError,
    decode_image,
    image_payload,
    is_data_uri,
    is_url,
)

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, file_format, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, file_format, **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height, depth=8, colour=2):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def decoded(data, size=16, max_pixels=MAX_PIXELS):
    return decode_image(data, size, max_pixels)


def refused(call, *args):
    with pytest.raises(RequestError) as caught:
        call(*args)
    assert caught.value.status == 422
    return caught.value


def reference(image, size):
    """open_clip's preprocess, written anew with PIL alone: shorter side to `size`, bicubic, the middle."""
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image)[upper : upper + size, left : left + size]


# Errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "authentication_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_error_has_openais_form(status, kind):
    error = RequestError(status, "what", "why", "image").to_error()
    assert error.model_dump() == {"message": "what", "type": kind, "param": "image", "code": "why"}


def test_an_error_travels_whole_between_processes():
    error = pickle.loads(pickle.dumps(RequestError(422, "what", "why", "images[3]")))
    assert (error.status, error.message, error.code, error.param) == (422, "what", "why", "images[3]")
    assert str(error) == "what"
    assert pickle.loads(pickle.dumps(RequestError(429, "what", "why"))).param is None


def test_a_param_that_is_set_later_travels_too():
    error = RequestError(422, "what", "why")
    error.param = "image"
    assert pickle.loads(pickle.dumps(error)).to_error().param == "image"


# Base64 and data: URIs


@given(st.binary(min_size=1, max_size=300))
def test_base64_is_read_with_and_without_line_breaks_and_in_a_uri(data):
    text = base64.b64encode(data).decode()
    for given_text in (text, base64.encodebytes(data).decode(), text + "\r\n", f"data:image/png;base64,{text}"):
        assert image_payload(given_text, "image", len(data)) == data


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/jpeg;base64,QUJD",
        "DATA:IMAGE/WEBP;BASE64,QUJD",
        "data:image/gif;charset=utf-8;base64,QUJD",
        'data:image/png;name="a b.png" ; base64 ,QUJD',
        "  \n data: image/png; base64, QU JD\r\n",
        "data:;base64,QUJD",
        "data:base64,QUJD",
        "data:application/octet-stream;base64,QUJD",
        "data:image/x-icon;base64,QUJD",
        "data:image/png;base64,QU%4AD",
        "data:image/png;base64,QUJ%44",
        "data:image/png,ABC",
        "data:image/png,%41%42C",
        "data:,A%42C",
    ],
)
def test_a_data_uri_of_a_picture_is_read(uri):
    assert is_data_uri(uri)
    assert image_payload(uri, "image", 3) == b"ABC"


def test_a_data_uri_may_lack_its_padding():
    assert image_payload("data:image/png;base64,QQ", "image", 3) == b"A"
    assert image_payload("data:image/png;base64,QQ%3D%3D", "image", 3) == b"A"


def test_a_caption_about_data_is_no_uri():
    captions = ["data: image and text", "Data, an android", "data: cats, dogs", "DATA: a/b testing", "data", "data:"]
    assert not any(is_data_uri(text) for text in captions)
    assert all(is_data_uri(text) for text in ("data:image/png", "data:text/html,a", "data: text/html; charset=x,a"))


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("QUI", "image_not_base64", "3 characters are no multiple of 4"),
        ("QUJDR", "image_not_base64", "5 characters are no multiple of 4"),
        ("QU JD", "image_not_base64", "without spaces"),
        ("QU-_", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("QQ==QQ==", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("====", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("QUJé", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("QUJ\ud800", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("cat.jpg", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("https://example.org/cat.jpg", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("data:image/png;base64", "image_not_base64", "has a comma"),
        ("data:image/png;base64,Q", "image_not_base64", "1 characters are no multiple of 4"),
        ("data:image/png;base64,Q-_A", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("data:image/png;base64,QUJ\ud800", "image_not_base64", "A-Z a-z 0-9 + /"),
        ("data:text/html;base64,QUJD", "image_media_type", "data:image/png;base64,..."),
        ("data:text/plain,QUJD", "image_media_type", "data:image/png;base64,..."),
        ("data:,", "image_empty", "no bytes"),
        ("data:image/png;base64,", "image_empty", "no bytes"),
        ("\n", "image_empty", "no bytes"),
    ],
)
def test_what_is_no_base64_of_a_picture_says_what_is_wrong(text, code, message):
    error = refused(image_payload, text, "images[2]", 1000)
    assert (error.code, error.param) == (code, "images[2]")
    assert message in error.message


def test_an_error_does_not_repeat_a_long_text():
    for text in ("x y" * 10_000, "data:" + "x" * 10_000, "data:image/png" + ";x" * 10_000):
        assert len(refused(image_payload, text, "image", 100_000).message) < 200


@pytest.mark.parametrize("length", [1, 2, 3, 4, 100, 101])
def test_the_longest_file_is_held_to_the_byte(length):
    text = base64.b64encode(bytes(length)).decode()
    assert len(image_payload(text, "image", length)) == length
    percents = "data:," + "%00" * length
    assert image_payload(percents, "image", length) == bytes(length)
    assert refused(image_payload, percents, "image", length - 1).code == "image_too_large"
    error = refused(image_payload, text, "image", length - 1)
    assert (error.code, error.message) == ("image_too_large", f"the picture is longer than {length - 1} bytes")


def test_a_text_that_is_too_long_is_not_decoded(monkeypatch):
    monkeypatch.setattr(binascii, "a2b_base64", lambda *args, **options: pytest.fail("decoded"))
    assert refused(image_payload, "A" * 4000, "image", 2999).code == "image_too_large"


def test_urls_are_told_from_base64():
    assert all(is_url(text) for text in ("https://a/b", "HTTP://a", "file:///etc/passwd", "ftp://a", "s3://a"))
    assert not any(is_url(text) for text in ("data:image/png;base64,QUJD", "QUJD", "//a/b", "", "A" * 10_000, "://"))


# Pixels


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(("width", "height"), [(40, 40), (61, 33), (33, 61), (7, 9)])
def test_pixels_are_the_references(file_format, width, height):
    data = encoded(noise(width, height), file_format)
    got = decoded(data)
    assert got.dtype == np.uint8
    assert got.flags.writeable
    assert np.array_equal(got, reference(Image.open(io.BytesIO(data)), 16))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_is_read(mode):
    white = Image.new("I;16", (20, 20), 65535) if mode == "I;16" else Image.new("RGB", (20, 20), "white").convert(mode)
    assert (decoded(encoded(white, "PNG")) == 255).all()


def test_a_cmyk_jpeg_is_read():
    red = Image.new("RGB", (20, 20), "red").convert("CMYK")
    assert np.abs(decoded(encoded(red, "JPEG", quality=95)).astype(int) - [255, 0, 0]).max() < 6


def test_a_16_bit_colour_png_is_read():
    rows = b"".join(b"\0" + b"\xff\xff\x80\x00\x00\x00" * 20 for _ in range(20))
    data = png_header(20, 20, depth=16) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(decoded(data).astype(int) - [255, 128, 0]).max() <= 1


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(file_format):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(decoded(data).astype(int) - [255, 0, 0]).max() < 6


def test_a_progressive_jpeg_is_read():
    data = encoded(noise(64, 64), "JPEG", progressive=True)
    assert np.array_equal(decoded(data), reference(Image.open(io.BytesIO(data)), 16))


def test_the_bytes_decide_and_not_the_declared_type():
    data = image_payload(
        "data:image/jpeg;base64," + base64.b64encode(encoded(noise(20, 20), "PNG")).decode(), "", 10**6
    )
    assert np.array_equal(decoded(data), reference(Image.fromarray(noise(20, 20)), 16))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_picture_that_lies_on_its_side_is_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = encoded(noise(50, 34), "JPEG", exif=exif.tobytes(), subsampling=0, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(lying)))
    assert np.array_equal(decoded(lying), reference(upright, 16))
    assert not np.array_equal(decoded(lying), decoded(encoded(noise(50, 34), "JPEG", subsampling=0, quality=95)))


# Sizes


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png_header(20_000, 20_000) + chunk(b"IDAT", b""), id="png"),
        pytest.param(b"GIF89a" + struct.pack("<HHBBB", 20_000, 20_000, 0, 0, 0) + b"," + bytes(10), id="gif"),
        pytest.param(
            b"\xff\xd8\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 20_000, 20_000) + b"\x01\x01\x11\x00\xff\xda\x00\x02",
            id="jpeg",
        ),
    ],
)
def test_a_bomb_is_refused_by_its_header(data):
    # There is nothing but a header here: whoever decodes finds a damaged file.
    error = refused(decoded, data)
    assert error.code == "image_too_large"
    assert error.message == "the picture has 20000 x 20000 pixels; at most 50000000 are allowed"
    assert refused(decoded, data, 16, 400_000_000).code == "image_undecodable"


def test_a_webp_of_a_few_bytes_and_many_pixels_is_refused():
    data = encoded(Image.new("RGB", (3000, 3000)), "WEBP", lossless=True, quality=0, method=0)
    assert len(data) < 100
    assert refused(decoded, data, 16, 8_999_999).code == "image_too_large"


def test_a_gif_frame_larger_than_its_screen_counts():
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    descriptor = data.index(b",\0\0\0\0\x08\0\x08\0")
    data[descriptor + 5 : descriptor + 9] = struct.pack("<HH", 9_000, 9_000)
    assert refused(decoded, bytes(data)).message.startswith("the picture has 9000 x 9000 pixels")
    data[descriptor + 5 : descriptor + 9] = struct.pack("<HH", 65_535, 65_535)  # above Pillow's own limit
    assert refused(decoded, bytes(data)).code == "image_too_large"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("size", [(8, 8), (61, 33), (300, 200)])
def test_the_frames_of_an_avif_are_as_large_as_the_image(mode, size):
    image = Image.fromarray(noise(*size)).convert(mode)
    assert set(frame_sizes(encoded(image, "AVIF", speed=10))) == {size}


def test_an_avif_whose_frame_is_larger_than_it_says_is_refused():
    data = encoded(Image.new("RGB", (600, 400)), "AVIF", speed=10)
    place = data.index(b"ispe") + 8
    assert struct.unpack_from(">II", data, place) == (600, 400)
    lying = data[:place] + struct.pack(">II", 8, 8) + data[place + 8 :]
    error = refused(decoded, lying, 16, 600 * 400 - 1)
    assert (error.code, "a frame of" in error.message) == ("image_too_large", True)


def test_an_animated_avif_is_not_read():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime")]
    data = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    assert refused(decoded, data).code == "image_undecodable"


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_most_pixels_are_held_to_the_pixel(file_format):
    data = encoded(noise(30, 20), file_format)
    assert decoded(data, max_pixels=600).shape == (16, 16, 3)
    assert refused(decoded, data, 16, 599).code == "image_too_large"


def test_pillows_own_limit_is_neither_in_the_way_nor_changed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert decoded(encoded(noise(40, 40), "PNG")).shape == (16, 16, 3)
    assert Image.MAX_IMAGE_PIXELS == 300


@pytest.mark.parametrize("turned", [False, True])
def test_a_thin_picture_is_refused_before_it_is_enlarged(turned):
    def stripe(length):
        return encoded(noise(*((1, length) if turned else (length, 1))), "PNG")

    assert decoded(stripe(MAX_ASPECT)).shape == (16, 16, 3)
    error = refused(decoded, stripe(MAX_ASPECT + 1))
    assert error.code == "image_too_thin"
    assert "a side may be at most 200 times the other" in error.message
    assert refused(decoded, stripe(50_000), 224).code == "image_too_thin"


@pytest.mark.parametrize(("width", "height"), [(0, 10), (10, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(width, height):
    assert refused(decoded, png_header(width, height) + chunk(b"IDAT", b"")).code == "image_undecodable"
    assert refused(decoded, b"").code == "image_empty"


# Damage


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_undecodable(file_format, share):
    data = encoded(noise(64, 64), file_format)
    error = refused(decoded, data[: int(len(data) * share)])
    assert error.code == "image_undecodable"
    assert error.message == "the picture cannot be decoded: it is damaged or cut off"


@pytest.mark.parametrize(
    "data",
    [b"\0", b"not a picture", b"<svg/>", b"BM" + bytes(100), b"II*\0" + bytes(100), b"%!PS-Adobe-3.0 EPSF-3.0\n"],
)
def test_other_formats_are_named_undecodable(data):
    error = refused(decoded, data)
    assert error.code == "image_undecodable"
    assert error.message == "the picture cannot be decoded: it is not a JPEG, PNG, WebP, GIF or AVIF file"


@pytest.mark.parametrize(
    "start", [b"", *images.READERS, b"\0\0\0\x20ftypavif", b"RIFF\x20\0\0\0WEBPVP8X", b"GIF89a\x01\0\x01\0\x80\0\0"]
)
@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_undecodable_and_nothing_else(start, tail):
    assert refused(decoded, start + tail + b"x").code in ("image_undecodable", "image_too_large", "image_too_thin")


@pytest.mark.parametrize("file_format", FORMATS)
def test_whatever_is_damaged_there_are_pixels_or_a_request_error(file_format):
    options = {"exif": exif_with_resolution(), "progressive": True} if file_format == "JPEG" else {}
    data = encoded(noise(24, 24), file_format, **options)
    generator = random.Random(file_format)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 6)):
            # Headers are where most can go wrong.
            place = generator.randrange(generator.choice((64, len(data))))
            damaged[place] = generator.choice((0, 1, 127, 128, 255, generator.randrange(256)))
        try:
            outcomes.add(decoded(bytes(damaged), max_pixels=10**6).shape)
        except RequestError as error:
            outcomes.add(error.code)
    assert "image_undecodable" in outcomes
    assert outcomes <= {(16, 16, 3), "image_undecodable", "image_too_large", "image_too_thin"}


def test_a_giant_text_in_a_png_is_not_unpacked():
    giant = zlib.compress(bytes(20_000_000))
    data = png_header(4, 4) + chunk(b"zTXt", b"Comment\0\0" + giant) + encoded(noise(4, 4), "PNG")[33:]
    assert len(data) < 100_000
    assert np.array_equal(decoded(data), decoded(encoded(noise(4, 4), "PNG")))


def exif_with_resolution():
    exif = Image.Exif()
    exif[0x0128], exif[0x011A] = 2, 300.0
    return exif.tobytes()


def jpeg_with_broken_exif():
    exif = bytearray(exif_with_resolution())
    exif[exif.index(b"\x01\x1a") + 4 :][:4] = b"\xff\xff\xff\xff"
    return encoded(noise(20, 20), "JPEG", exif=bytes(exif[:-6]))


def test_nothing_is_warned_of():
    apng = png_header(20, 20) + chunk(b"acTL", bytes(8)) + encoded(noise(20, 20), "PNG")[33:]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(jpeg_with_broken_exif()))
        Image.open(io.BytesIO(apng))
    assert len(heard) >= 2  # or this test would prove nothing
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert np.array_equal(decoded(jpeg_with_broken_exif()), decoded(encoded(noise(20, 20), "JPEG")))
        assert np.array_equal(decoded(apng), decoded(encoded(noise(20, 20), "PNG")))
        refused(decoded, png_header(10_000, 10_000) + chunk(b"IDAT", b""))
        num_filters = len(warnings.filters)
        decoded(jpeg_with_broken_exif())
        assert len(warnings.filters) == num_filters
    assert heard == []


# JPEGs with many scans


def with_scans(data, num_more):
    """A progressive JPEG whose last scan comes again and again."""
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * num_more + data[-2:]


def test_a_jpeg_of_endless_scans_is_refused():
    data = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    num_scans = data.count(b"\xff\xda")
    assert decoded(with_scans(data, MAX_JPEG_SCANS - num_scans)).shape == (16, 16, 3)
    error = refused(decoded, with_scans(data, MAX_JPEG_SCANS - num_scans + 1))
    assert error.code == "image_undecodable"
    assert error.message == "the picture cannot be decoded: it has more than 100 scans"


@pytest.mark.parametrize(
    "hiding", [b"\xff\xfe\x00\x04\xff\xd9", b"\xff\x01\xff", b"\xff\xff\xff", b"\xff\xd0"], ids=lambda text: text.hex()
)
def test_scans_cannot_be_hidden(hiding):
    data = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert "scans" in refused(decoded, data[:-2] + (hiding + scan) * 200 + data[-2:]).message


def test_what_follows_a_jpeg_is_not_counted():
    data = encoded(noise(20, 20), "JPEG")
    assert np.array_equal(decoded(data + b"\x00\x02" + b"\xff\xda\x00\x02" * 500), decoded(data))
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 4000) + b"\xff\xda\x00\x00" * 1000
    assert np.array_equal(decoded(data[:2] + comment + data[2:]), decoded(data))


# Threads


def test_many_threads_decode_at_once():
    files = [encoded(noise(40, 40, seed), FORMATS[seed % len(FORMATS)]) for seed in range(8)] + [b"\xff\xd8\xff", b"x"]
    expected = [decoded(data) if len(data) > 3 else None for data in files]
    barrier = threading.Barrier(4)

    def work(offset):
        barrier.wait(10)
        for i in range(40):
            place = (i + offset) % len(files)
            if expected[place] is None:
                refused(decoded, files[place])
            else:
                assert np.array_equal(decoded(files[place]), expected[place])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
