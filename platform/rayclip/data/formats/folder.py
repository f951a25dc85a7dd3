"""A folder of pictures, each with a text beside it, or in folders named after what they show.

Indexing writes a listing of the folder, a table; a chunk is a range of its bytes.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from rayclip.data.formats import table
from rayclip.data.formats.base import IMAGE_EXTENSIONS, Layout, Sample, Shard, Span, is_litter
from rayclip.data.formats.members import add_images, read_many
from rayclip.io.s3 import File
from rayclip.io.storage import join, split

LISTING = "listing.tsv"
IMAGES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)

_COLUMNS = ("path", "beside", "caption", "class")


def list_chunks(shard: Shard, chunk_samples: int, layout: Layout) -> list[Span]:
    """Runs of `chunk_samples` neighbours of the listing."""
    return table.list_chunks(shard, chunk_samples, replace(layout, careful=False))


def read_chunk(shard: Shard, span: Span, layout: Layout) -> list[Sample]:
    """The samples of a range of the listing. Raises OSError where that cannot be read."""
    rows = list(table.read_rows(shard, span, replace(layout, careful=False)))
    folder = layout.pictures or split(shard.path)[0]
    samples = [_sample(row) for row in rows]
    add_images([(sample, row["path"]) for sample, row in zip(samples, rows, strict=True)], folder)
    beside = [(sample, row["beside"]) for sample, row in zip(samples, rows, strict=True) if row["beside"]]
    texts = read_many([join(folder, path) for _, path in beside])
    for (sample, path), text in zip(beside, texts, strict=True):
        if isinstance(text, bytes):
            sample[PurePosixPath(path).suffix[1:]] = text
    return samples


def make_listing(files: Sequence[File]) -> tuple[bytes, list[str]]:
    """(the table of the pictures among the files, the classes), the latter where folders are all that names them."""
    names = {file.name for file in files}
    pictures = [file.name for file in files if is_image(file.name)]
    beside = [_beside(picture, names) for picture in pictures]
    by_class = not any(beside) and all("/" in picture for picture in pictures)
    classes = sorted({picture.rpartition("/")[0] for picture in pictures}) if by_class else []
    number = {name: i for i, name in enumerate(classes)}
    target = io.StringIO()
    writer = csv.writer(target, delimiter="\t", lineterminator="\n")
    writer.writerow(_COLUMNS)
    for picture, text in zip(pictures, beside, strict=True):
        folder = picture.rpartition("/")[0]
        writer.writerow((picture, text, *((_spoken(folder), number[folder]) if by_class else ("", ""))))
    return target.getvalue().encode("utf-8", "surrogateescape"), [_spoken(name) for name in classes]


def read_listing(listing: bytes) -> list[str]:
    """The names of the pictures in what `make_listing` wrote."""
    lines = io.StringIO(listing.decode("utf-8", "surrogateescape"), newline="")
    return [row[0] for row in csv.reader(lines, delimiter="\t") if row][1:]


def is_image(name: str) -> bool:
    """Whether a file is a picture, by its name."""
    return name.lower().endswith(IMAGES) and not is_litter(name)


def _sample(row: table.Row) -> Sample:
    sample = {"__key__": row["path"].rpartition(".")[0].encode("utf-8", "surrogateescape")}
    if row["class"]:
        sample |= {"txt": row["caption"].encode("utf-8", "surrogateescape"), "cls": row["class"].encode()}
    return sample


def _beside(picture: str, names: set[str]) -> str:
    stem = picture.rpartition(".")[0]
    return next((name for name in (f"{stem}.txt", f"{stem}.json") if name in names), "")


def _spoken(folder: str) -> str:
    """A class folder's name as a caption: "animals/great_dane" is "great dane"."""
    return folder.rpartition("/")[2].replace("_", " ").replace("-", " ")
