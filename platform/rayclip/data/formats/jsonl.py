"""JSON Lines with a picture's path and captions in each line, as the metadata.jsonl of Hugging Face's imagefolder.

A chunk is a range of bytes that holds whole lines.
"""

import json
from typing import Any

from rayclip.data.formats.base import Layout, Sample, Shard, Span
from rayclip.data.formats.members import add_images, caption_members, pick
from rayclip.io.storage import open_file, read_range, split

_HEAD_BYTES = 2**20


def list_chunks(shard: Shard, chunk_samples: int, layout: Layout) -> list[Span]:
    """Runs of `chunk_samples` neighbours. Raises OSError for a file that cannot be read."""
    spans, start, end, num_samples = list[Span](), 0, 0, 0
    with open_file(shard.path) as file:
        for line in file:
            end += len(line)
            num_samples += bool(line.strip())
            if num_samples == chunk_samples:
                spans.append(Span(start, end - start, num_samples))
                start, num_samples = end, 0
    return [*spans, Span(start, end - start, num_samples)] if num_samples else spans


def read_chunk(shard: Shard, span: Span, layout: Layout) -> list[Sample]:
    """The samples of a range of bytes. Raises OSError where it cannot be read."""
    samples, pictures = list[Sample](), []
    for line in read_range(shard.path, span.offset, span.length).splitlines():
        if not line.strip():
            continue
        row = _row(line)
        path = None if row is None else row.get(layout.image_column)
        if row is None or not isinstance(path, str | None):
            malformed = b"row_malformed"
            samples.append({"__key__": b"", "__no_image__": malformed, "__no_caption__": malformed})
            continue
        key = (path or "").encode("utf-8", "surrogatepass")
        sample = {"__key__": key} | caption_members(
            layout.caption_columns, [pick(row, column) for column in layout.caption_columns]
        )
        samples.append(sample)
        if path:
            pictures.append((sample, path))
    add_images(pictures, layout.pictures or split(shard.path)[0])
    return samples


def read_columns(shard: Shard) -> list[str]:
    """The keys of the first line that is an object; none where there is no such line."""
    lines = read_range(shard.path, 0, min(shard.size, _HEAD_BYTES)).splitlines()
    return next((list(row) for row in map(_row, lines) if row is not None), [])


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
