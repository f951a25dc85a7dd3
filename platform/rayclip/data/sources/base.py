"""What every source speaks."""

from collections.abc import Sequence
from hashlib import blake2b
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


def hold_out(items: Sequence[Any], names: Sequence[str], share: float) -> dict[str, Split]:
    """Splits `train` and `held_out`; the latter gets about `share` of the pictures, and is there only where it has any.

    A hash of the picture's name decides, so all captions of a picture stay together, and pictures that are added later
    move none of the others.
    """
    if not share:
        return {"train": Split(items)}
    limit = int(share * 2**64)
    held_out = [int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) < limit for name in names]
    parts = {
        "train": [item for item, out in zip(items, held_out, strict=True) if not out],
        "held_out": [item for item, out in zip(items, held_out, strict=True) if out],
    }
    return {split: Split(chosen) for split, chosen in parts.items() if chosen}


class Source(Protocol):
    """The interface of the modules here."""

    def splits(self, config: Any, cache: Path) -> dict[str, Split]:
        """What there is to read, by split. `cache` is a folder for downloads. Raises UserError."""

    def read(self, item: Any, config: Any) -> Record:
        """Read one item, on any machine. Raises BadSampleError for a pair that cannot be used."""
