"""What every format speaks: a module with `list_chunks` and `read_chunk`."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

Sample = dict[str, bytes]
"""One sample's files by extension ("png", "txt", "json", "cls"); "__key__" holds its name.

Where what should be there could not be read, "__no_image__" or "__no_caption__" holds the cause.
"""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of pictures among a sample's files."""

PICTURE = "jpg"
"""The extension of a picture whose name has none of use; what it is, its first bytes say."""


class Span(NamedTuple):
    """Where a chunk lies in its shard: in bytes, in Parquet in rows."""

    offset: int
    length: int
    num_samples: int


class Shard(NamedTuple):
    """A file of samples: its path or address, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Layout:
    """How the shards of a data set are to be read."""

    kind: str = "tar"
    image_column: str = ""
    caption_columns: tuple[str, ...] = ()
    separator: str = ""
    pictures: str = ""
    """The folder that pictures' paths begin from; empty for the table's own."""


class ChunkError(OSError):
    """A shard, or a part of it, that is not what its format wants."""


class Format(Protocol):
    """The interface of the modules here."""

    def list_chunks(self, shard: Shard, chunk_samples: int, layout: Layout) -> list[Span]:
        """Cut a shard into chunks of about `chunk_samples`. Raises OSError for one that is not whole."""

    def read_chunk(self, shard: Shard, span: Span, layout: Layout) -> list[Sample]:
        """The samples of one chunk, in order. Raises OSError where they cannot be read."""
