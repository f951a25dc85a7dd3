"""From a source's record to a sample's files. What training can read as it is keeps its bytes."""

import io

from PIL import Image

from rayclip.config import IngestConfig
from rayclip.data.decode import BadSampleError, open_stored, to_rgb, upright, what_fails_is_bad
from rayclip.data.formats.tar import Sample
from rayclip.data.sources import Record

_READABLE = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_PIL_NAMES = {extension: name for name, extension in _READABLE.items()}


def to_sample(record: Record, key: str, config: IngestConfig) -> Sample:
    """The files of one sample. Raises BadSampleError for an empty caption or a picture that cannot be decoded."""
    caption = " ".join(record.caption.split())
    if not caption:
        raise BadSampleError("caption_empty")
    extension, data = encode_image(record.image, config)
    sample = {"__key__": key.encode(), extension: data, "txt": caption.encode()}
    return sample if record.cls is None else sample | {"cls": str(record.cls).encode()}


def encode_image(image: bytes | Image.Image, config: IngestConfig) -> tuple[str, bytes]:
    """(extension, file) as the config wants it. Raises BadSampleError for a picture that cannot be decoded."""
    picture = open_stored(image) if isinstance(image, bytes) else image
    with what_fails_is_bad():
        picture.load()
        extension = _READABLE.get(picture.format or "", "png") if config.image_format == "keep" else config.image_format
        turned = upright(picture)
        small = config.shorter_side is None or min(picture.size) <= config.shorter_side
        if isinstance(image, bytes) and turned is picture and small and _PIL_NAMES[extension] == picture.format:
            return extension, image
        rgb = to_rgb(turned)
        if config.shorter_side is not None and not small:
            rgb = _shrink(rgb, config.shorter_side)
        target = io.BytesIO()
        rgb.save(target, _PIL_NAMES[extension], quality=config.quality)
        return extension, target.getvalue()


def _shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    scale = shorter_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)
