"""From a sample's files to pixels and a caption. Pictures stay uint8: the model normalises them on its device.

How large a picture may be is said here alone, for training, embedding, evaluation, ingestion and the service.
"""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from rayclip.data.formats.base import IMAGE_EXTENSIONS, Sample
from rayclip.data.jpeg import Box, crop_jpeg, exif_transpose, is_whole_jpeg, jpeg_size

MAX_PIXELS = 178_956_970
"""Most pixels of a picture that is decoded; Pillow refuses larger ones too."""

MAX_ASPECT = 200
"""Longer side over shorter. A picture is resized by its shorter side before its middle is cut out: 1 x 50,000 pixels
would become 224 x 11,200,000. At this limit the resized picture has 200 times the pixels that are kept."""

GUARD_CAUSES = ("loss_not_finite", "gradient_not_finite", "loss_spike", "logit_scale_collapsed")
"""Why a sample that could be read was left out: what a step came to that it was in."""

CAUSES = (
    "fine",
    "chunk_unreadable",
    "sample_missing",
    "no_image",
    "image_unreadable",
    "image_undecodable",
    "no_caption",
    "caption_not_utf8",
    "caption_empty",
    *GUARD_CAUSES,
    "image_too_large",
    "image_too_thin",
    "row_malformed",
)
"""Why a sample was skipped; its index in this tuple is the code that travels with the stream, and that runs keep in
samples.npy. New ones come at the end: the codes of files that are there already must not change."""


class BadSampleError(Exception):
    """A sample that cannot be trained on; `cause` is one of CAUSES."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def read_caption(sample: Sample) -> str:
    """The caption in a sample's `txt`. Raises BadSampleError where there is none, or no text in it."""
    if "txt" not in sample:
        raise BadSampleError(sample.get("__no_caption__", b"no_caption").decode())
    try:
        caption = sample["txt"].decode().strip()
    except UnicodeDecodeError:
        raise BadSampleError("caption_not_utf8") from None
    if not caption:
        raise BadSampleError("caption_empty")
    return caption


def read_captions(sample: Sample) -> list[str]:
    """A caption a line of a sample's `txt`, as data sets for retrieval have them. Raises BadSampleError as above."""
    return [line.strip() for line in read_caption(sample).splitlines() if line.strip()]


def image_bytes(sample: Sample) -> bytes:
    """The file of the sample's picture. Raises BadSampleError where there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise BadSampleError(sample.get("__no_image__", b"no_image").decode())


def read_image(sample: Sample) -> Image.Image:
    """The sample's picture, upright, opened but for most files not yet decoded. Raises BadSampleError."""
    return open_image(image_bytes(sample))


def open_image(data: bytes) -> Image.Image:
    """A picture's file, opened and upright. Raises BadSampleError, also for one above the limits of size."""
    image = open_stored(data)
    with what_fails_is_bad():
        return upright(image)


def open_stored(data: bytes) -> Image.Image:
    """A picture's file, opened, as it is stored. Raises BadSampleError, also for one above the limits of size."""
    with what_fails_is_bad():
        image = Image.open(io.BytesIO(without_png_text(data)))
    check_image_size(*image.size)
    return image


def check_image_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise BadSampleError, image_too_large or image_too_thin, for a picture that is not to be decoded."""
    if width * height > max_pixels:
        raise BadSampleError("image_too_large")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSampleError("image_too_thin")


def check_image(data: bytes, decode: bool = True) -> None:
    """Raise BadSampleError where training could not read a picture's file: decoded at the smallest scale there is.

    Without `decode` its header alone is read, which finds what is no picture, and what is too large.
    """
    size = jpeg_size(data)
    if size is not None:
        check_image_size(*size)
        if not decode or is_whole_jpeg(data, size):
            return
    image = open_image(data) if decode else open_stored(data)
    with what_fails_is_bad():
        if decode:
            image.draft("RGB", (1, 1))  # of JPEGs; does nothing to others
            to_rgb(image).load()


_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"iCCP", b"zTXt", b"iTXt", b"tEXt")


def without_png_text(data: bytes) -> bytes:
    """A PNG's file without its colour profile and its texts, any other file as it is.

    Pillow unpacks those, and refuses the whole picture where one of them is larger than a megabyte.
    """
    if not data.startswith(_PNG_START) or not any(kind in data for kind in _PNG_TEXT):
        return data
    kept, at = [_PNG_START], len(_PNG_START)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])  # length, kind, what it holds, checksum
        if data[at + 4 : at + 8] not in _PNG_TEXT:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


@contextmanager
def what_fails_is_bad() -> Iterator[None]:
    """Around the decoding of a picture: raises BadSampleError for whatever it raises.

    Damaged files make PIL raise nearly anything: OSError and ValueError mostly, but also struct.error, EOFError,
    RuntimeError. One picture must not end a run.
    """
    try:
        yield
    except Image.DecompressionBombError:
        raise BadSampleError("image_too_large") from None
    except Exception:
        raise BadSampleError("image_undecodable") from None


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF data say it is to be shown; once turned it has none, and is not turned again."""
    turn = exif_transpose(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    del turned.info["exif"]
    return turned


def crop_image(data: bytes, choose_box: Callable[[int, int], Box], size: int) -> np.ndarray:
    """The part of a picture's file that `choose_box(width, height)` names, resized, uint8 [size, size, 3].

    An ordinary JPEG is decoded by libjpeg-turbo; PIL decodes all else, and says what is broken. Raises
    BadSampleError.
    """
    picture = jpeg_size(data)
    if picture is not None:
        check_image_size(*picture)
        crop = crop_jpeg(data, picture, choose_box(*picture), size)
        if crop is not None:
            return crop
    image = open_image(data)
    return crop_to_array(image, choose_box(*image.size), size)


def crop_to_array(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Decode, cut `box` (left, upper, right, lower) out and resize it, uint8 [size, size, 3].

    A JPEG is decoded at the smallest scale that still covers the crop. Raises BadSampleError.
    """
    with what_fails_is_bad():
        if image.format == "JPEG":
            # draft() halves the picture while it stays at least as large as asked for; the box shrinks with it.
            share = size / max(1.0, min(box[2] - box[0], box[3] - box[1]))
            wide, high = image.size
            drafted = image.draft("RGB", (math.ceil(wide * share), math.ceil(high * share)))
            # By the exact factor, 1/2, 1/4 or 1/8: the drafted picture's size is rounded up.
            scale = drafted[1][2] / wide if drafted else 1.0
            left, upper, right, lower = (edge * scale for edge in box)
            box = (left, upper, min(right, image.width), min(lower, image.height))
        image = to_rgb(image)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB, of deeper grey the higher eight bits; what is transparent goes on white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # PIL would cut all above 255 off
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(grey_HW: np.ndarray) -> np.ndarray:
    """Grey of 32 bits, whole or floating, as uint8 [H, W].

    No file says what its white is: it is the least of 1 (floating numbers only), 255, 65,535 and 4,294,967,295 that no
    value is above. What is below 0, or is no number, is black.
    """
    if grey_HW.dtype == np.int32 and grey_HW.min() < 0:  # whole numbers without a sign, which Pillow gives one
        grey_HW = grey_HW.view(np.uint32)
    values_HW = np.nan_to_num(grey_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    whites = (1.0, 2.0**8 - 1, 2.0**16 - 1, 2.0**32 - 1)[grey_HW.dtype != np.float32 :]
    most = values_HW.max()
    white = next((white for white in whites if most <= white), most)
    return np.clip(values_HW / white * 255, 0, 255).round().astype(np.uint8)


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: np.ndarray
) -> Box:
    """The box of a random resized crop: its share of the area within `scale`, its width over height within `ratio`.

    `draws` are four numbers in [0, 1): area, ratio, left, upper. A box that would not fit is cut to the picture.
    """
    area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + (high - low) * draws[1])
    box_width = min(width, math.sqrt(area * aspect))
    box_height = min(height, math.sqrt(area / aspect))
    left, upper = (width - box_width) * draws[2], (height - box_height) * draws[3]
    return left, upper, left + box_width, upper + box_height


def eval_array(image: Image.Image, size: int) -> np.ndarray:
    """CLIP's reference preprocess: shorter side to `size` by PIL's bicubic, then the middle, uint8 [size, size, 3].

    Within one level of open_clip's, which turns no picture upright and makes 16-bit grey ones white: those that need it
    are turned here, as in training, and scaled. Raises BadSampleError, also for an image above the limits of size.
    """
    check_image_size(*image.size)
    with what_fails_is_bad():
        image = to_rgb(upright(image))
        short = min(image.size)
        # The longer side is cut down to whole pixels, as torchvision's Resize does.
        image = image.resize(
            (int(size * image.width / short), int(size * image.height / short)), Image.Resampling.BICUBIC
        )
        left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
        return np.array(image.crop((left, upper, left + size, upper + size)))  # a copy that torch may own
