"""A data set in which one sample of twenty is broken or odd, in all the ways that the web has, and it is known how.

Files are encoded from known pixels, so that what is decoded has something independent to be compared with.
"""

import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

SIDE = 32
SHARD_SAMPLES, CHUNK_SAMPLES = 100, 25
NUM_SAMPLES = 10_000
GONE, HALF = 37, 61
"""Shards that are lost after the index was made: one as a whole, of the other the second half."""

_NUM_PICTURES = 40
Pixels = np.ndarray


@dataclass(frozen=True)
class Corpus:
    """The samples; of each its cause ("fine" where it must be trained on) and its kind, "plain" for most."""

    samples: list[dict[str, bytes]]
    causes: list[str]
    kinds: list[str]
    pixels: list[Pixels]

    def bad(self) -> Counter[tuple[str, str, int]]:
        """How often (cause, shard, row in the chunk) must be in the quarantine, for each epoch."""
        return Counter(
            (cause, f"{i // SHARD_SAMPLES:06}.tar", i % CHUNK_SAMPLES)
            for i, cause in enumerate(self.causes)
            if cause != "fine"
        )


def build_corpus() -> Corpus:
    """Odd samples are spread over all shards but the two that are lost, where all count as unreadable."""
    images = [soft_noise(seed) for seed in range(_NUM_PICTURES)]
    plain = [encoded(pixels, "JPEG", quality=95, subsampling=0) for pixels in images]
    # 25 samples of each that is bad, ten of each that is odd: with the lost ones they are a twentieth.
    todo = [(kind, *BAD[kind]) for kind in BAD for _ in range(25)]
    todo += [(kind, "fine", partial(_odd, ODD[kind])) for kind in ODD for _ in range(10)]
    usable = [i for i in range(NUM_SAMPLES) if i // SHARD_SAMPLES not in (GONE, HALF)]
    chosen = np.random.default_rng(0).choice(usable, len(todo), replace=False).tolist()
    odd = dict(zip(chosen, todo, strict=True))
    corpus = Corpus([], [], [], [])
    for i in range(NUM_SAMPLES):
        pixels = images[i % _NUM_PICTURES]
        files = {"jpg": plain[i % _NUM_PICTURES], "txt": f"picture number {i}".encode()}
        kind, cause, spoil = odd.get(i, ("plain", "fine", lambda files, pixels, i: files))
        lost = i // SHARD_SAMPLES == GONE or (i // SHARD_SAMPLES == HALF and i % SHARD_SAMPLES >= SHARD_SAMPLES // 2)
        corpus.samples.append({"__key__": f"{i:06}".encode(), **spoil(files, pixels, i)})
        corpus.causes.append("chunk_unreadable" if lost else cause)
        corpus.kinds.append(kind)
        corpus.pixels.append(pixels)
    return corpus


def soft_noise(seed: int) -> Pixels:
    """Pixels that JPEG keeps well, uint8 [32, 32, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def encoded(pixels: Pixels | Image.Image, file_format: str, **options: object) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, file_format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG from its own rows, for what PIL does not write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ]
    packed = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _gigapixel_jpeg() -> bytes:
    data = bytearray(encoded(soft_noise(0), "JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def _cut(file_format: str, pixels: Pixels) -> bytes:
    data = encoded(pixels, file_format)
    return data[: len(data) * 6 // 10]


def _picture(extension: str, make: Callable[[Pixels], bytes]) -> Callable[..., dict[str, bytes]]:
    """The same sample with another picture."""
    return lambda files, pixels, i: {extension: make(pixels), "txt": files["txt"]}


def _odd(make: Callable[[Pixels, int], tuple[str, bytes]], files: dict[str, bytes], pixels: Pixels, i: int) -> dict:
    extension, data = make(pixels, i)
    return {extension: data, "txt": files["txt"]}


BAD: dict[str, tuple[str, Callable[..., dict[str, bytes]]]] = {
    "cut jpg": ("image_undecodable", _picture("jpg", partial(_cut, "JPEG"))),
    "cut png": ("image_undecodable", _picture("png", partial(_cut, "PNG"))),
    "cut webp": ("image_undecodable", _picture("webp", partial(_cut, "WEBP"))),
    "zero bytes": ("image_undecodable", _picture("jpg", lambda pixels: b"")),
    "gigapixel png": (
        "image_too_large",
        _picture("png", lambda p: png(10**5, 10**5, 8, 2, zlib.compress(bytes(99)))),
    ),
    "gigapixel jpg": ("image_too_large", _picture("jpg", lambda pixels: _gigapixel_jpeg())),
    "no picture": ("no_image", lambda files, pixels, i: {"txt": files["txt"]}),
    "no caption": ("no_caption", lambda files, pixels, i: {"jpg": files["jpg"]}),
    "caption not UTF-8": ("caption_not_utf8", lambda files, pixels, i: files | {"txt": "café".encode("latin-1")}),
    "caption empty": ("caption_empty", lambda files, pixels, i: files | {"txt": b" \r\n"}),
}
"""What is quarantined: its cause, and from (files, pixels, number) to its files."""


def _turned(pixels: Pixels, i: int) -> tuple[str, bytes]:
    """Stored so that its EXIF orientation, 2 to 8 in turn, makes it what it is."""
    orientation = 2 + i % 7
    flip, rotate = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose
    undo = {2: flip, 3: rotate.ROTATE_180, 4: rotate.FLIP_TOP_BOTTOM, 5: rotate.TRANSPOSE, 6: rotate.ROTATE_90,
            7: rotate.TRANSVERSE, 8: rotate.ROTATE_270}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels).transpose(undo[orientation])
    return "jpg", encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif.tobytes())


def _deep(pixels: Pixels, channels: int) -> bytes:
    """16 bits a channel, of which the lower eight are other than the higher."""
    deep = (pixels[..., :channels].astype(np.uint16) << 8 | 0x5A).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    return png(SIDE, SIDE, 16, 2 if channels == 3 else 0, zlib.compress(rows))


def _palette(pixels: Pixels) -> bytes:
    return encoded(Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE), "PNG")


def _animated(file_format: str, pixels: Pixels, **options: object) -> bytes:
    others = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime")]
    return encoded(pixels, file_format, save_all=True, append_images=others, duration=50, **options)


ODD: dict[str, Callable[[Pixels, int], tuple[str, bytes]]] = {
    "a png called jpg": lambda pixels, i: ("jpg", encoded(pixels, "PNG")),
    "a jpg called png": lambda pixels, i: ("png", encoded(pixels, "JPEG", quality=95, subsampling=0)),
    "cmyk": lambda pixels, i: ("jpg", encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=98)),
    "16-bit grey": lambda pixels, i: ("png", _deep(pixels, 1)),
    "16-bit colour": lambda pixels, i: ("png", _deep(pixels, 3)),
    "palette": lambda pixels, i: ("png", _palette(pixels)),
    "animated gif called png": lambda pixels, i: ("png", _animated("GIF", pixels)),
    "animated webp called jpeg": lambda pixels, i: ("jpeg", _animated("WEBP", pixels, lossless=True)),
    "animated png": lambda pixels, i: ("png", _animated("PNG", pixels)),
    "exif rotation": _turned,
}
"""What is trained on: from (pixels, number) to (extension, file)."""
