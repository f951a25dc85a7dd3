"""What every format speaks: a module with `list_chunks` and `read_chunk`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

Sample = dict[str, bytes]
"""One sample's files by extension ("png", "txt", "json", "cls"); "__key__" holds its name.

Where what should be there could not be read, "__no_image__" or "__no_caption__" holds the cause.
"""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif")
"""Extensions of pictures among a sample's files; of several pictures the first in this order is the sample's."""

USUAL_KEYS = ("caption", "captions", "text")
"""Where a sample's JSON has its caption, where the settings name no key."""

PICTURE = "jpg"
"""The extension of a picture whose name has none of use; what it is, its first bytes say."""


def is_litter(name: str) -> bool:
    """Whether a file is what macOS or Windows leaves beside others: `._0.jpg`, `__MACOSX/`, `Thumbs.db` and so on."""
    file = name.rpartition("/")[2]
    return file.startswith("._") or file in _LITTER or name.startswith("__MACOSX/") or "/__MACOSX/" in name


_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")


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
    careful: bool = False
    """Whether samples are told apart with more care than most data sets need: in a tar a name that repeats begins a new
    sample and the files that macOS adds are none; a quote in a table is only one where it closes; rows of Parquet
    without a picture are no samples. The manifest of a data set in which that makes no difference does not say it."""

    def to_dict(self) -> dict[str, Any]:
        """As the manifest writes it, and its digest takes it."""
        return {key: value for key, value in asdict(self).items() if key != "careful" or value}


class ChunkError(OSError):
    """A shard, or a part of it, that is not what its format wants."""


class MissingColumnError(ChunkError):
    """A shard without a column that the others have; `columns` are those it has."""

    def __init__(self, shard: Shard, missing: str, columns: Sequence[str]) -> None:
        super().__init__(f"'{shard.path}' has no column '{missing}'; it has: {', '.join(columns) or 'an empty header'}")
        self.columns = tuple(columns)


def check_columns(shard: Shard, layout: Layout, columns: Sequence[str]) -> None:
    """Raise MissingColumnError where a shard lacks a column that the layout names, or the one that its field is in."""
    for wanted in (layout.image_column, *layout.caption_columns):
        if wanted not in columns and wanted.partition(".")[0] not in columns:
            raise MissingColumnError(shard, wanted, columns)


class Format(Protocol):
    """The interface of the modules here."""

    def list_chunks(self, shard: Shard, chunk_samples: int, layout: Layout) -> list[Span]:
        """Cut a shard into chunks of about `chunk_samples`. Raises OSError for one that is not whole."""

    def read_chunk(self, shard: Shard, span: Span, layout: Layout) -> list[Sample]:
        """The samples of one chunk, in order. Raises OSError where they cannot be read."""
