"""What curation knows of a sample, from looking at it once: its caption, and its picture's size, digest and hash."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import pyarrow as pa

from rayclip.data.curation.duplicates import HASH_SIDE, perceptual_hash
from rayclip.data.decode import BadSampleError, crop_image, image_bytes, read_caption
from rayclip.data.formats.tar import Sample

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # shard name / sample key
        ("chunk", pa.int64()),
        ("row", pa.int32()),
        ("cause", pa.string()),  # null, or why it cannot be read: what follows is null then
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("digest", pa.binary(16)),
        ("hash", pa.uint64()),
    ]
)


class SampleStats(NamedTuple):
    """A row of SCHEMA beside the sample's place."""

    cause: str | None
    caption: str | None = None
    width: int | None = None
    height: int | None = None
    digest: bytes | None = None
    hash: int | None = None


def sample_stats(sample: Sample | None) -> SampleStats:
    """Look at a sample; None stands for one that is missing."""
    width, height = 0, 0

    def whole(*size: int) -> tuple[float, float, float, float]:
        nonlocal width, height
        width, height = size
        return 0, 0, width, height

    try:
        if sample is None:
            raise BadSampleError("sample_missing")
        caption, data = read_caption(sample), image_bytes(sample)
        image = crop_image(data, whole, HASH_SIDE)
    except BadSampleError as error:
        return SampleStats(error.cause)
    digest = blake2b(data, digest_size=16).digest()
    return SampleStats(None, caption, width, height, digest, perceptual_hash(image))


def to_table(places: Sequence[tuple[str, int, int]], stats: Sequence[SampleStats]) -> pa.Table:
    """From (id, chunk, row) and what was seen."""
    rows = [(*place, *seen) for place, seen in zip(places, stats, strict=True)]
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCHEMA)
