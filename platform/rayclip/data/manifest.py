"""The manifest of a data set: its shards, and the chunks of neighbouring samples that one ranged read fetches.

`manifest.parquet` lies beside the shards. A row is a chunk: (shard, offset, length, num_samples), the shard by its
index in the list of names that stands in the file's metadata with each shard's size in bytes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.data.formats.tar import Span
from rayclip.data.order import mix64
from rayclip.errors import UserError
from rayclip.files import whole_file

FILE_NAME = "manifest.parquet"
_KEY = b"rayclip"
_SUBSET = -1  # where an epoch stands in the order of a run; no epoch has this number


@dataclass(frozen=True, eq=False)
class Manifest:
    """Chunks of a data set. Arrays are [num_chunks]; bytes and samples are counts."""

    folder: str
    shards: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    num_samples: np.ndarray

    @classmethod
    def from_spans(cls, folder: str | Path, shards: Sequence[tuple[str, int, Sequence[Span]]]) -> "Manifest":
        """From (name, bytes, chunks) of each shard. The order of the shards is kept: it is part of the identity."""
        spans = [(index, *span) for index, (_, _, spans) in enumerate(shards) for span in spans]
        columns = np.array(spans, dtype=np.int64).reshape(-1, 4).T
        return cls(
            str(folder),
            tuple(name for name, _, _ in shards),
            tuple(size for _, size, _ in shards),
            columns[0].astype(np.int32),
            columns[1].copy(),
            columns[2].copy(),
            columns[3].astype(np.int32),
        )

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def total_samples(self) -> int:
        """Samples in the data set."""
        return int(self.num_samples.sum(dtype=np.int64))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, sizes and chunks: two manifests with one digest give one stream."""
        state = hashlib.sha256(json.dumps([self.shards, self.shard_bytes]).encode())
        for array in (self.shard, self.offset, self.length, self.num_samples):
            state.update(np.ascontiguousarray(array).astype("<i8").tobytes())
        return state.hexdigest()

    def subset(self, fraction: float, seed: int) -> "Manifest":
        """So large a share of the chunks, at least one: those that come first in an order of their own.

        A function of the seed, and a smaller share lies within a larger one. The shards stay as they are.
        """
        if fraction == 1:
            return self
        rank = np.argsort(mix64(seed, _SUBSET, np.arange(len(self))), kind="stable")
        kept = np.sort(rank[: max(1, round(fraction * len(self)))])
        columns = {name: getattr(self, name)[kept] for name in ("shard", "offset", "length", "num_samples")}
        return replace(self, **columns)

    def read_chunk(self, chunk: int) -> bytes:
        """The bytes of one chunk. Raises OSError where the shard cannot be read that far."""
        length = int(self.length[chunk])
        path = Path(self.folder) / self.shards[self.shard[chunk]]
        with path.open("rb", buffering=0) as shard:
            shard.seek(int(self.offset[chunk]))
            data = shard.read(length)
        if len(data) != length:
            raise OSError(f"'{path}' ends inside a chunk: {len(data)} of {length} bytes")
        return data

    def check_shards(self) -> None:
        """Raise UserError where a shard is missing or has another size than when it was indexed."""
        for name, size in zip(self.shards, self.shard_bytes, strict=True):
            path = Path(self.folder) / name
            if not path.is_file():
                raise UserError(f"the manifest in '{self.folder}' names shard '{name}', which is not there")
            if path.stat().st_size != size:
                raise UserError(
                    f"shard '{path}' has {path.stat().st_size:,} bytes, its manifest says {size:,}: "
                    f"index it again with python -m jobs.index {self.folder}"
                )

    def save(self) -> Path:
        """Write `manifest.parquet` into the folder, whole and then named."""
        meta = {"format": 1, "shards": self.shards, "shard_bytes": self.shard_bytes, "digest": self.digest}
        table = pa.table(
            {name: getattr(self, name) for name in ("shard", "offset", "length", "num_samples")},
        ).replace_schema_metadata({_KEY: json.dumps(meta)})
        path = Path(self.folder) / FILE_NAME
        with whole_file(path) as target:
            pq.write_table(table, target, compression="zstd")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read the manifest of a data set's folder. Raises UserError where there is none, or it is damaged."""
        path = Path(folder) / FILE_NAME
        if not Path(folder).is_dir():
            raise UserError(f"no data set at '{folder}': the folder does not exist")
        if not path.is_file():
            raise UserError(f"no '{FILE_NAME}' in '{folder}': write one with python -m jobs.index {folder}")
        try:
            table = pq.read_table(path)
            meta = json.loads((table.schema.metadata or {})[_KEY])
            columns = {name: table[name].to_numpy() for name in ("shard", "offset", "length", "num_samples")}
            shards, sizes = tuple(meta["shards"]), tuple(meta["shard_bytes"])
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise UserError(f"'{path}' is not a rayclip manifest: {str(error).splitlines()[0]}") from error
        manifest = cls(str(folder), shards, sizes, **columns)
        if not len(manifest):
            raise UserError(f"the data set in '{folder}' is empty: its manifest lists no samples")
        if manifest.digest != meta["digest"]:
            raise UserError(f"'{path}' is damaged: its digest does not match its rows")
        return manifest
