"""From a sample's files to pixels and a caption. Pictures stay uint8: the model normalises them on its device."""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from rayclip.data.formats.base import IMAGE_EXTENSIONS, Sample
from rayclip.data.jpeg import Box, crop_jpeg, exif_transpose, jpeg_size

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
)
"""Why a sample was skipped; its index in this tuple is the code that travels with the stream."""


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
    """A picture's file, opened and upright. Raises BadSampleError."""
    with what_fails_is_bad():
        return upright(Image.open(io.BytesIO(data)))


@contextmanager
def what_fails_is_bad() -> Iterator[None]:
    """Around the decoding of a picture: raises BadSampleError for whatever it raises.

    Damaged files make PIL raise nearly anything: OSError and ValueError mostly, but also struct.error, EOFError,
    RuntimeError. One picture must not end a run.
    """
    try:
        yield
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
    """The picture as RGB, of 16-bit grey the higher eight bits; what is transparent goes on white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # PIL would cut all above 255 off
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


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
    are turned here, as in training, and scaled. Raises BadSampleError.
    """
    with what_fails_is_bad():
        image = to_rgb(upright(image))
        short = min(image.size)
        # The longer side is cut down to whole pixels, as torchvision's Resize does.
        image = image.resize(
            (int(size * image.width / short), int(size * image.height / short)), Image.Resampling.BICUBIC
        )
        left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
        return np.array(image.crop((left, upper, left + size, upper + size)))  # a copy that torch may own
