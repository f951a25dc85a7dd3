"""A request's pictures: from base64 or a data: URI to bytes, and from bytes to the pixels that the model takes.

Everything here reads what strangers send: whatever they send, the answer is pixels or a RequestError.
"""

import binascii
import io
import re
import warnings
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from rayclip.data.decode import MAX_ASPECT, BadSampleError, check_image_size, eval_array, without_png_text
from rayclip.serve.avif import frame_sizes
from rayclip.serve.schemas import Error

READERS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,
}
"""The formats that are read, by how their files begin; AVIF besides, whose mark stands behind a length.

They are what browsers show and other services take. Each further decoder could be attacked and has no such use: TIFF is
a family of formats, BMP's runs are expanded in Python, EPS starts a program. The readers are called by name because
Image.open has a limit of its own, below which it warns.
"""

FORMATS = "JPEG, PNG, WebP, GIF or AVIF"
"""The same for people."""

MAX_JPEG_SCANS = 100
"""Encoders write about ten. A scan of some 70 bytes can make the decoder go over all pixels again."""

TYPES = {401: "authentication_error", 403: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

_URL = re.compile(r"[a-z][a-z0-9+.-]{0,20}://", re.IGNORECASE)
# A caption may begin with "Data:" as well; a URI goes on with a type, a parameter, or the comma at once.
_DATA_URI = re.compile(r"\s*data:(?:image\b|\s*(?:[\w.+-]{1,127}/[\w.+-]{1,127}\s*[;,]|;|,|base64\s*,))", re.IGNORECASE)
_BLANKS = str.maketrans("", "", " \t\r\n\f")
_BINARY = ("", "application/octet-stream", "binary/octet-stream")
"""Types of data: URIs that say nothing of the content."""
# Of one that begins with avis, an animation, other parts are decoded than those whose size is looked at.
_AVIF = re.compile(rb".{4}ftyp(?:avif|mif1.{4,64}?avif)", re.DOTALL)
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # those that a length follows, and the end
_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as warnings.filters holds it
_SCAN, _END = b"\xda", b"\xd9"


class RequestError(Exception):
    """A request, or one picture of it, that cannot be answered. It keeps all it says when it is pickled.

    `status` is the HTTP status, `message` one line for people, `code` one word for programs, and `param` the part of
    the request that is meant, such as "images[3]".
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, code, param)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def __str__(self) -> str:
        return self.message

    def to_error(self) -> Error:
        """The error as it goes over the wire."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        # It may quote what a stranger wrote: line breaks, and what a terminal or a page would obey.
        message = "".join(
            character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in self.message
        )
        return Error(message=message, type=kind, param=self.param, code=self.code)


def is_url(text: str) -> bool:
    """Whether a picture is given as a URL, of whatever scheme. A data: URI is none, and base64 never looks like one."""
    return _URL.match(text) is not None


def is_data_uri(text: str) -> bool:
    """Whether a text is a data: URI, in any case and with blanks before it, rather than a caption about data."""
    return _DATA_URI.match(text) is not None


def image_payload(text: str, param: str, max_bytes: int) -> bytes:
    """The bytes of an image given as base64 (line breaks are allowed, as encoders put them in) or as a data: URI.

    Raises RequestError 422: image_media_type, image_not_base64, image_too_large (above max_bytes), image_empty.
    """
    start = text[:100].lstrip()
    if start[:5].lower() == "data:":
        data = _data_of_uri(text, param, max_bytes)
    else:
        data = _from_base64(text.replace("\r", "").replace("\n", ""), param, max_bytes)
    if not data:
        raise RequestError(422, "the picture has no bytes", "image_empty", param)
    return data


def _data_of_uri(text: str, param: str, max_bytes: int) -> bytes:
    """The bytes of a data: URI as browsers read it: of any image type or none, percent-encoded or in base64."""
    header, comma, data = text.lstrip()[5:].partition(",")
    media_type, *parameters = (part.strip() for part in header.lower().split(";"))
    if media_type == "base64" and not parameters:  # data:base64,... is often written
        media_type, parameters = "", ["base64"]
    if not media_type.startswith("image/") and media_type not in _BINARY:
        raise RequestError(422, "a data: URI must be of an image, data:image/png;base64,...", "image_media_type", param)
    if not comma:
        message = "a data: URI has a comma before its data: data:image/png;base64,..."
        raise RequestError(422, message, "image_not_base64", param)
    if "base64" in parameters[-1:]:
        if "%" in data:
            data = unquote_to_bytes(data.encode(errors="replace")).decode("latin-1")
        data = data.translate(_BLANKS)
        return _from_base64(data + "=" * (-len(data) % 4 if len(data) % 4 != 1 else 0), param, max_bytes)
    # Three characters at the most stand for a byte.
    if len(data) > 3 * max_bytes or len(found := unquote_to_bytes(data.encode(errors="replace"))) > max_bytes:
        raise _too_many_bytes(max_bytes, param)
    return found


def _from_base64(text: str, param: str, max_bytes: int) -> bytes:
    # Before decoding, and exactly: four characters hold three bytes, less one for each = at the end.
    if len(text) // 4 * 3 - text[-2:].count("=") > max_bytes:
        raise _too_many_bytes(max_bytes, param)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise _not_base64(text, param) from None


def _too_many_bytes(max_bytes: int, param: str) -> RequestError:
    return RequestError(422, f"the picture is longer than {max_bytes} bytes", "image_too_large", param)


def _not_base64(text: str, param: str) -> RequestError:
    """Names what is likely wrong, without repeating what may be a long text."""
    if re.fullmatch(r"[A-Za-z0-9+/]+", text):
        message = f"the base64 is cut off or lacks its = at the end: {len(text)} characters are no multiple of 4"
    else:
        message = "the picture must be base64: A-Z a-z 0-9 + / with = at the end, without spaces, or a data: URI of it"
    return RequestError(422, message, "image_not_base64", param)


def decode_image(data: bytes, size: int, max_pixels: int) -> np.ndarray:
    """The pixels of a file's (first) picture by CLIP's reference preprocess, uint8 [size, size, 3].

    May be called from several threads. The header is read first: pictures of more than max_pixels are not decoded.
    (Pillow has a limit for canvases of WebP and GIF, 179 million pixels, which a larger max_pixels does not lift.)

    Raises RequestError 422 and nothing else: image_empty, image_undecodable, image_too_large, image_too_thin.
    """
    if not data:
        raise RequestError(422, "the picture has no bytes", "image_empty")
    _silence_pillow()
    try:
        with _open(data) as image:
            _check_size(image.width, image.height, max_pixels)
            if isinstance(image, AvifImageFile):
                _check_frames(data, max_pixels)
            return eval_array(image, size)
    except RequestError:
        raise
    except (MemoryError, Image.DecompressionBombError):
        raise RequestError(422, "the picture is too large to be decoded", "image_too_large") from None
    # Mostly a BadSampleError, but damaged files make Pillow raise nearly anything: struct.error, EOFError, zlib.error.
    except Exception:
        raise _undecodable("it is damaged or cut off") from None


def _silence_pillow() -> None:
    """What Pillow warns of, such as a corrupt EXIF block, is written by strangers and is no business of the log.

    For the process, as catch_warnings around each picture would not be safe in threads; and looked up each time, as
    others' catch_warnings may have taken the filter away, while adding it anew makes Python forget what it has shown.
    """
    if _PILLOW_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_WARNINGS[3].pattern)


def _open(data: bytes) -> ImageFile:
    """The picture with its header read. Raises RequestError, or what the reader raises."""
    reader = next((reader for start, reader in READERS.items() if data.startswith(start)), None)
    if reader is None and _AVIF.match(data):
        reader = AvifImageFile
    if reader is None:
        raise _undecodable(f"it is not a {FORMATS} file")
    # The plain count takes no time and is enough for nearly all; videos that phones append have the bytes by chance.
    if reader is JpegImageFile and data.count(b"\xff" + _SCAN) > MAX_JPEG_SCANS and _has_too_many_scans(data):
        raise _undecodable(f"it has more than {MAX_JPEG_SCANS} scans")
    return reader(io.BytesIO(without_png_text(data)))


def _has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG has more than MAX_JPEG_SCANS, found by going from marker to marker as the decoder does."""
    position, num_scans = 2, 0
    while num_scans <= MAX_JPEG_SCANS:
        marker = _JPEG_MARKER.search(data, position)
        if marker is None or marker[1] == _END:
            return False
        num_scans += marker[1] == _SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return True


def _check_size(width: int, height: int, max_pixels: int) -> None:
    try:
        check_image_size(width, height, max_pixels)
    except BadSampleError as error:
        allowed = {
            "image_too_large": f"at most {max_pixels} are allowed",
            "image_too_thin": f"a side may be at most {MAX_ASPECT} times the other",
        }[error.cause]
        message = f"the picture has {width} x {height} pixels; {allowed}"
        raise RequestError(422, message, error.cause) from None


def _check_frames(data: bytes, max_pixels: int) -> None:
    """Raise RequestError where an AVIF file's frames are larger than its header says; ValueError for a strange file."""
    areas = [width * height for width, height in frame_sizes(data)]
    if not areas:
        raise _undecodable("it has no frame")
    # Colours, transparency, and the edges of tiles.
    if max(areas) > max_pixels or sum(areas) > 3 * max_pixels:
        raise RequestError(422, f"a frame of the picture has more than {max_pixels} pixels", "image_too_large")


def _undecodable(why: str) -> RequestError:
    return RequestError(422, f"the picture cannot be decoded: {why}", "image_undecodable")
