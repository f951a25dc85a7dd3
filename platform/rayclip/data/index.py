"""Reading what chunks a tar shard has that someone else wrote."""

import tarfile
from pathlib import Path

from rayclip.data.formats.tar import BLOCK, Span, list_spans
from rayclip.errors import UserError


def find_shards(folder: Path) -> list[Path]:
    """The folder's tar shards by name, which is the order that becomes the data set's. Raises UserError for none."""
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder")
    shards = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not shards:
        raise UserError(f"'{folder}' has no tar shards (*.tar)")
    return shards


def index_shard(shard: Path, chunk_samples: int) -> tuple[int, list[Span]]:
    """(bytes, chunks) of one shard. Raises UserError, naming the file, for one that is not a whole tar."""
    size = shard.stat().st_size
    try:
        with shard.open("rb") as file:
            spans = list(list_spans(file, chunk_samples))
            end = spans[-1].offset + spans[-1].length if spans else 0
            file.seek(end)
            mark = file.read(BLOCK)
    except tarfile.ReadError as error:
        raise UserError(f"'{shard}' is not a whole tar: {error}") from None
    except OSError as error:
        raise UserError(f"'{shard}' cannot be read: {error.strerror}") from None
    # A tar that was cut between two files, or inside a header, reads as a shorter tar but for this mark.
    if mark != bytes(BLOCK):
        raise UserError(f"'{shard}' is not a whole tar: it is cut off after {min(end, size):,} bytes")
    return size, spans
