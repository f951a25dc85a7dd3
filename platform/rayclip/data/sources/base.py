"""What every source speaks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image


class Split(NamedTuple):
    """Items of one split in the source's own order: small, picklable, with a `repr` that is the same on every run.

    An evaluation split has the names of its classes, in order of their index.
    """

    items: Sequence[Any]
    class_names: Sequence[str] | None = None


class Record(NamedTuple):
    """One pair: a picture, encoded or drawn, its caption, and its class in an evaluation split."""

    image: bytes | Image.Image
    caption: str
    cls: int | None = None


class Source(Protocol):
    """The interface of the modules here."""

    def splits(self, config: Any, cache: Path) -> dict[str, Split]:
        """What there is to read, by split. `cache` is a folder for downloads. Raises UserError."""

    def read(self, item: Any, config: Any) -> Record:
        """Read one item, on any machine. Raises BadSampleError for a pair that cannot be used."""
