"""Pictures that are small as files and large, or nothing, as anything else."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.serve.wire import ANY, MEGABYTE


def image(kind: str = "PNG", size: tuple[int, int] = (24, 18), **options: object) -> bytes:
    """An encoded picture."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def bombs() -> list[tuple[str, bytes, frozenset[int | None]]]:
    read, refused = frozenset({200}), frozenset({422})
    return [
        ("PNG of 49 million pixels", plain("PNG"), read),
        ("GIF of 49 million pixels", plain("GIF"), read),
        ("JPEG of 49 million pixels", plain("JPEG"), read),
        ("PNG that says 50,000 x 50,000", png(b"\0" * 1000, 50_000, 50_000), refused),
        ("PNG that says 4 billion x 4 billion", png(b"\0", 2**32 - 1, 2**32 - 1), refused),
        ("PNG that says 0 x 0", png(b"", 0, 0), refused),
        ("PNG with 200 MB for 8 x 8 pixels", png(b"\0" * 200 * MEGABYTE, 8, 8), ANY),
        ("PNG with a text of 200 MB", png(b"\0" * 200, 8, 8, b"zTXt", b"a\0\0", 200 * MEGABYTE), ANY),
        ("PNG with a colour profile of 200 MB", png(b"\0" * 200, 8, 8, b"iCCP", b"a\0\0", 200 * MEGABYTE), ANY),
        ("PNG of 1 x 40,000", png(b"\0" * 200_000, 1, 40_000), refused),
        ("JPEG with 5,000 scans", many_scans(5_000), refused),
        ("JPEG that says 65,535 x 65,535", _jpeg_of(65_535, 65_535), refused),
        ("WebP that says 16 million x 16 million", webp(2**24 - 1, 2**24 - 1), refused),
        ("GIF with 10,000 frames", gif(10_000), ANY),
        ("GIF that says 65,535 x 65,535", gif(1, 65_535), refused),
        ("GIF with a frame larger than itself", gif(1, 8, 65_535), ANY),
        ("WebP with 1,000 frames", _frames(1_000), ANY),
    ]


def png(pixels: bytes, width: int, height: int, kind: bytes = b"", head: bytes = b"", length: int = 0) -> bytes:
    """A grey PNG of packed `pixels`, before them a chunk of a `kind` whose `length` zeros are packed after `head`."""
    extra = _chunk(kind, head + zlib.compress(b"\0" * length, 9)) if kind else b""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), extra, _chunk(b"IDAT", zlib.compress(pixels, 9)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def many_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = image("JPEG", (64, 64), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * number + b"\xff\xd9"


def _jpeg_of(width: int, height: int) -> bytes:
    data = image("JPEG")
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def webp(width: int, height: int) -> bytes:
    """A WebP of which only the header is there."""
    body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"WEBPVP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk)) + chunk


def gif(frames: int, size: int = 8, frame_size: int | None = None) -> bytes:
    """A GIF whose frames are one grey pixel and then nothing."""
    frame_size = frame_size or size
    screen = b"GIF89a" + struct.pack("<HH", size, size) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHH", 0, 0, frame_size, frame_size) + b"\0" + b"\x02\x02\x4c\x01\0"
    return screen + frame * frames + b";"


def _frames(number: int) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (i % 256, 0, 0)) for i in range(number)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=1, quality=1, method=0)
    return file.getvalue()


@functools.cache
def plain(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("L" if kind == "GIF" else "RGB", (7000, 7000)).save(file, kind)
    return file.getvalue()
