"""The fast way from a JPEG to a crop: libjpeg-turbo at the smallest scale that covers it, then torch's bicubic.

torch resizes uint8 with PIL's own bicubic filter, vectorised: the same picture to within two levels, in a third of the
time. Which JPEGs take this way is decided by what PIL would make of them: those that it treats in a way of its own
(colours for print, a rotation in the EXIF data, more pixels than it accepts) and those that are damaged are left to it.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image

Box = tuple[float, float, float, float]

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_COLOURS = ("YCbCr", "Gray")
# libjpeg-turbo has vector code for these; scales between them take longer than the next larger one.
_REDUCTIONS = (8, 4, 2)


def exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright by its EXIF data; None where it is, or where those are damaged."""
    if "exif" not in image.info:
        return None
    try:
        return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # PIL's reader of EXIF data has no error of its own: struct.error, SyntaxError and others
        return None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that `crop_jpeg` takes; None for every other file."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        if b"Exif\0\0" in data and exif_transpose(Image.open(io.BytesIO(data))) is not None:
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return None
    fits = Image.MAX_IMAGE_PIXELS is None or width * height <= Image.MAX_IMAGE_PIXELS
    return (width, height) if colours in _COLOURS and fits else None


def crop_jpeg(data: bytes, image: tuple[int, int], box: Box, size: int) -> np.ndarray | None:
    """Cut `box` (left, upper, right, lower) out and resize it, uint8 [size, size, 3]; None for a damaged file.

    `image` is what `jpeg_size` gave. The box is rounded to whole pixels of the picture as it is decoded.
    """
    share = min(box[2] - box[0], box[3] - box[1]) / size
    reduction = next((reduction for reduction in _REDUCTIONS if share >= reduction), 1)
    try:
        if reduction == 1:
            pixels_HWC = simplejpeg.decode_jpeg(data)
        else:
            wide, high = (-(-side // reduction) for side in image)
            pixels_HWC = simplejpeg.decode_jpeg(data, min_height=high, min_width=wide)
    except ValueError:
        return None
    left, right = _whole(box[0] / reduction, box[2] / reduction, pixels_HWC.shape[1])
    upper, lower = _whole(box[1] / reduction, box[3] / reduction, pixels_HWC.shape[0])
    return resize(pixels_HWC[upper:lower, left:right], size)


def is_whole_jpeg(data: bytes, image: tuple[int, int]) -> bool:
    """Whether libjpeg-turbo finds nothing wrong with a file, decoded as small as it can."""
    try:
        wide, high = (-(-side // _REDUCTIONS[0]) for side in image)
        simplejpeg.decode_jpeg(data, min_height=high, min_width=wide)
    except ValueError:
        return False
    return True


def resize(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """Bicubic with antialiasing, uint8 [H, W, 3] to uint8 [size, size, 3]."""
    # Here, for the sake of processes that hand the stream on and crop nothing: to import it takes a second.
    import torch
    from torch.nn.functional import interpolate

    if pixels_HWC.shape[:2] == (size, size):
        return pixels_HWC
    # In this order, or torch takes the one picture for a planar one and answers in planes, which are slow to read.
    image_1CHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
    resized_1CSS = interpolate(image_1CHW, (size, size), mode="bicubic", antialias=True)
    return resized_1CSS[0].permute(1, 2, 0).numpy()


def _whole(start: float, stop: float, length: int) -> tuple[int, int]:
    """The nearest whole pixels, one at least, within 0 to `length`."""
    first = min(round(start), length - 1)
    return first, min(max(round(stop), first + 1), length)
