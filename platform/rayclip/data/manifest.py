"""The manifest of a data set: its shards, and the chunks of neighbouring samples that one ranged read fetches.

`manifest.parquet` lies beside the shards, or elsewhere and says where they are. A row is a chunk: (shard, offset,
length, num_samples), the shard by its index in the list of names that stands in the file's metadata, with each shard's
size in bytes and how all of them are to be read.
"""

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.data.captions import choose_caption
from rayclip.data.formats import FORMATS, Layout, Sample, Shard, Span
from rayclip.data.order import mix64
from rayclip.errors import UserError
from rayclip.io.patterns import is_pattern, select, split_pattern
from rayclip.io.read_only import is_web
from rayclip.io.s3 import File
from rayclip.io.storage import find_file, find_files, is_remote, join, list_files, read_bytes, read_range, write_bytes

FILE_NAME = "manifest.parquet"
PARTIAL = "manifest.partial.parquet"
"""What an index that was interrupted has found."""

_logger = logging.getLogger(__name__)

_KEY = b"rayclip"
_COLUMNS = ("shard", "offset", "length", "num_samples")
_BLOCK = 1 << 18  # chunks that a digest takes at once
_FEW_SHARDS = 100  # more are looked up by one listing
_SUBSET = -1  # where an epoch stands in the order of a run; no epoch has this number

Chunks = Sequence[Span] | np.ndarray
"""Chunks of a shard; as an array, int64 [num_chunks, 3]."""


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
    layout: Layout = Layout()  # noqa: RUF009 (frozen)
    root: str = ""
    """Where the shards are; empty for the manifest's own folder."""
    stamps: tuple[str, ...] = ()
    """What tells that a shard has changed; no part of what the data set is."""
    notes: Mapping[str, Any] | None = None
    """What the index was made with."""
    reports: Mapping[str, Any] | None = None
    """What the index found in shards that are not all fine, by name (data/inspect.py)."""

    @classmethod
    def from_spans(
        cls, folder: str | Path, shards: Sequence[tuple[str, int, Chunks]], layout: Layout | None = None, **more: Any
    ) -> "Manifest":
        """From (name, bytes, chunks) of each shard. The order of the shards is kept: it is part of the identity."""
        counts = [len(chunks) for _, _, chunks in shards]
        tables = [np.asarray(chunks, dtype=np.int64).reshape(-1, 3) for _, _, chunks in shards]
        columns = np.concatenate([np.empty((0, 3), dtype=np.int64), *tables]).T
        return cls(
            str(folder),
            tuple(name for name, _, _ in shards),
            tuple(size for _, size, _ in shards),
            np.repeat(np.arange(len(shards), dtype=np.int32), counts),
            columns[0].copy(),
            columns[1].copy(),
            columns[2].astype(np.int32),
            layout or Layout(),
            **more,
        )

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def total_samples(self) -> int:
        """Samples in the data set."""
        return int(self.num_samples.sum(dtype=np.int64))

    @property
    def shares(self) -> tuple[tuple[int, float], ...]:
        """As a mixture of one; see `Mixture.shares`."""
        return ((len(self), 1.0),)

    def parts(self) -> list[dict[str, Any]]:
        """What it is made of, for records: path, weight and number of samples."""
        return [{"path": self.folder, "weight": 1.0, "samples": self.total_samples}]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, sizes and chunks: two manifests with one digest give one stream."""
        state = hashlib.sha256(json.dumps([self.shards, self.shard_bytes]).encode())
        if self.layout != Layout():
            state.update(json.dumps(self.layout.to_dict()).encode())
        for name, block in itertools.product(_COLUMNS, range(0, len(self), _BLOCK)):
            state.update(getattr(self, name)[block : block + _BLOCK].astype("<i8"))
        return state.hexdigest()

    def subset(self, fraction: float, seed: int) -> "Manifest":
        """So large a share of the chunks, at least one: those that come first in an order of their own.

        A function of the seed, and a smaller share lies within a larger one. The shards stay as they are.
        """
        if fraction == 1:
            return self
        rank = np.argsort(mix64(seed, _SUBSET, np.arange(len(self))), kind="stable")
        kept = np.sort(rank[: max(1, round(fraction * len(self)))])
        return replace(self, **{name: getattr(self, name)[kept] for name in _COLUMNS})

    def take(self, chunks: np.ndarray) -> "Manifest":
        """Of these chunks alone, numbered as they are listed, with the shards that they are in."""
        kept, shard = np.unique(self.shard[chunks], return_inverse=True)
        names, sizes = ([of[i] for i in kept.tolist()] for of in (self.shards, self.shard_bytes))
        rows = {name: getattr(self, name)[chunks] for name in _COLUMNS} | {"shard": shard.astype(np.int32)}
        return replace(self, shards=tuple(names), shard_bytes=tuple(sizes), stamps=(), notes=None, reports=None, **rows)

    def _of_shards(self, patterns: Sequence[str], path: str) -> "Manifest":
        files = [File(name, size, "") for name, size in zip(self.shards, self.shard_bytes, strict=True)]
        chosen = {file.name for file in select(files, patterns, path)}
        if not chosen:
            raise UserError(
                f"'{path}' names none of the {len(files):,} shards in '{self.folder}', as '{files[0].name}'"
            )
        return self.take(np.flatnonzero(np.array([name in chosen for name in self.shards])[self.shard]))

    def shard_of(self, chunk: int) -> Shard:
        """The shard that a chunk is in."""
        index = int(self.shard[chunk])
        return Shard(self._path(self.shards[index]), self.shard_bytes[index])

    def place(self, chunk: int) -> tuple[str, int]:
        """(shard's name, offset) of a chunk, for messages."""
        return self.shards[self.shard[chunk]], int(self.offset[chunk])

    def read_samples(
        self, chunk: int, weights: Mapping[str, float] | None = None, draws: np.ndarray | None = None
    ) -> list[Sample]:
        """The samples of one chunk, each with its caption as `txt`: what `choose_caption` picks by `weights`.

        `draws` are float64 [num_samples]; without them it is the first caption. Raises OSError where the chunk cannot
        be read. What a chunk lacks of its samples is not made up for.
        """
        span = Span(int(self.offset[chunk]), int(self.length[chunk]), int(self.num_samples[chunk]))
        samples = FORMATS[self.layout.kind].read_chunk(self.shard_of(chunk), span, self.layout)[: span.num_samples]
        chosen = draws.tolist() if draws is not None else [0.0] * len(samples)
        return [choose_caption(s, weights or {}, draw) for s, draw in zip(samples, chosen, strict=False)]

    def read_chunk(self, chunk: int) -> bytes:
        """The bytes of one chunk of a format whose chunks are bytes. Raises OSError."""
        return read_range(self.shard_of(chunk).path, int(self.offset[chunk]), int(self.length[chunk]))

    def is_remote(self) -> bool:
        """Whether reading a chunk means waiting for a network."""
        return any(map(is_remote, (self.folder, self.root, self.layout.pictures)))

    def check_shards(self, may_lack: bool = False) -> None:
        """Raise UserError where a shard has another size than when it was indexed, or is missing, but if `may_lack`.

        Those that were written anew since, at the same size, are counted in a warning.
        """
        again, there = f"rayclip index {self.root or self.folder}", self._files_there()
        for name, expected, file in zip(self.shards, self.shard_bytes, there, strict=True):
            if file is None and may_lack:
                continue
            if file is None:
                raise UserError(f"the manifest in '{self.folder}' names shard '{name}', which is not there")
            if file.size != expected:
                raise UserError(
                    f"shard '{self._path(name)}' has {file.size:,} bytes, its manifest says {expected:,}: "
                    f"index it again with {again}"
                )
        changed = [
            file
            for file, stamp in zip(there, self.stamps, strict=False)
            if file and stamp and file.stamp not in ("", stamp)
        ]
        if changed:
            where = f"{len(changed):,} of {len(self.shards):,} shards in '{self.folder}'"
            _logger.warning(
                "%s were written anew since they were indexed, at the same size: %s looks again", where, again
            )

    def _files_there(self) -> list[File | None]:
        root = self.root or self.folder
        if is_remote(root) and not is_web(root) and len(self.shards) > _FEW_SHARDS:
            files = {file.name: file for file in list_files(root)}
            return [files.get(name) for name in self.shards]
        return find_files([self._path(name) for name in self.shards])

    def _path(self, shard: str) -> str:
        return join(self.root or self.folder, shard)

    def save(self, name: str = FILE_NAME) -> str:
        """Write `manifest.parquet` into the folder, whole and then named."""
        meta = {"format": 1, "shards": self.shards, "shard_bytes": self.shard_bytes, "digest": self.digest}
        more: dict[str, Any] = {"root": self.root, "stamps": self.stamps, "notes": self.notes, "reports": self.reports}
        more["layout"] = self.layout.to_dict() if self.layout != Layout() else None
        meta |= {key: value for key, value in more.items() if value}
        table = pa.table({name: getattr(self, name) for name in _COLUMNS})
        target = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(meta)}), target, compression="zstd")
        path = join(self.folder, name)
        write_bytes(path, target.getvalue())
        return path

    @classmethod
    def load(cls, folder: str | Path, name: str = FILE_NAME) -> "Manifest":
        """Read the manifest of a data set's folder, or of those of its shards that a path as FOLDER/{0..9}.tar names.

        Raises UserError where there is none, or it is damaged, or lacks a shard that is named.
        """
        path = join(folder, name)
        if is_pattern(str(folder)) and find_file(path) is None:
            root, patterns = split_pattern(str(folder))
            return cls.load(root, name)._of_shards(patterns, str(folder))
        if not is_remote(folder) and not Path(folder).is_dir():
            raise UserError(f"no data set at '{folder}': the folder does not exist")
        if find_file(path) is None:
            raise UserError(f"no '{name}' in '{folder}': write one with rayclip index {folder}")
        try:
            file = pq.ParquetFile(pa.BufferReader(read_bytes(path)))
            meta = json.loads((file.schema_arrow.metadata or {})[_KEY])
            columns = {name: file.read([name])[name].to_numpy() for name in _COLUMNS}  # one at a time: there are many
            shards, sizes = tuple(meta["shards"]), tuple(meta["shard_bytes"])
            layout = _layout_from(meta.get("layout"))
        except (pa.ArrowInvalid, KeyError, ValueError, TypeError) as error:
            raise UserError(f"'{path}' is not a rayclip manifest: {str(error).splitlines()[0]}") from error
        manifest = cls(
            str(folder), shards, sizes, **columns, layout=layout,
            root=meta.get("root", ""), stamps=tuple(meta.get("stamps", ())), notes=meta.get("notes"),
            reports=meta.get("reports"),
        )  # fmt: skip
        if not len(manifest):
            raise UserError(f"the data set in '{folder}' is empty: its manifest lists no samples")
        if manifest.digest != meta["digest"]:
            raise UserError(f"'{path}' is damaged: its digest does not match its rows")
        return manifest


def _layout_from(values: Mapping[str, Any] | None) -> Layout:
    if values is None:
        return Layout()
    layout = Layout(**{**values, "caption_columns": tuple(values["caption_columns"])})
    if layout.kind not in FORMATS:
        raise ValueError(f"unknown kind '{layout.kind}'")
    return layout
