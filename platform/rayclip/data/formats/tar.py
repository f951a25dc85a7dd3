"""WebDataset tar shards: files that share a name up to the first dot are one sample.

A chunk is a byte range of the tar that holds whole samples, so one ranged read fetches it and nothing else has
to be looked at. Numbers of bytes throughout.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE


class Span(NamedTuple):
    """Where a chunk lies in its shard."""

    offset: int
    length: int
    num_samples: int


Sample = dict[str, bytes]
"""One sample's files by extension ("png", "txt", "cls", "seg.png"); "__key__" holds the name they share."""


def split_name(name: str) -> tuple[str, str]:
    """("folder/000012", "seg.png") from "folder/000012.seg.png", as the webdataset library splits it."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, extension.lower()


def list_spans(shard: BinaryIO, chunk_size: int) -> Iterator[Span]:
    """Cut a shard into chunks of `chunk_size` neighbouring samples, reading only the headers of a seekable file.

    Raises tarfile.TarError or EOFError for a file that is not a whole tar.
    """
    offset, end, num_samples, last_key = 0, 0, 0, None
    with tarfile.open(fileobj=shard, mode="r:") as tar:
        for member in tar:
            if member.isfile():
                key, _ = split_name(member.name)
                if key != last_key:
                    if num_samples == chunk_size:
                        yield Span(offset, end - offset, num_samples)
                        offset, num_samples = end, 0
                    num_samples += 1
                    last_key = key
            end = member.offset_data + _padded(member.size)
    if num_samples:
        yield Span(offset, end - offset, num_samples)


def read_samples(chunk: bytes) -> list[Sample]:
    """The samples of one chunk's bytes, in order.

    Raises tarfile.TarError when the bytes do not start at a sample's header or end inside a file.
    """
    samples: list[Sample] = []
    last_key = None
    # Bytes cut from the middle of a tar have no end-of-archive blocks; tarfile reads to their end without them.
    with tarfile.open(fileobj=io.BytesIO(chunk), mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            if member.offset_data + member.size > len(chunk):
                raise tarfile.ReadError(f"'{member.name}' is cut off")
            key, extension = split_name(member.name)
            if key != last_key:
                samples.append({"__key__": key.encode()})
                last_key = key
            samples[-1][extension] = chunk[member.offset_data : member.offset_data + member.size]
    return samples


def write_shard(target: BinaryIO, samples: Iterable[Sample], chunk_size: int) -> list[Span]:
    """Write samples as a tar and return its chunks. The same samples give the same bytes."""
    spans: list[Span] = []
    offset, num_samples = 0, 0
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            key = sample["__key__"].decode()
            for extension in sorted(set(sample) - {"__key__"}):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(sample[extension])
                tar.addfile(info, io.BytesIO(sample[extension]))
            num_samples += 1
            if num_samples == chunk_size:
                spans.append(Span(offset, tar.offset - offset, num_samples))
                offset, num_samples = tar.offset, 0
        if num_samples:
            spans.append(Span(offset, tar.offset - offset, num_samples))
    return spans


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
