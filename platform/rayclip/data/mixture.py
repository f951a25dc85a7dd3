"""A mixture: several data sets read as one, each with its weight.

Its chunks are those of its parts, one part after another. A part of weight w gives every one of its samples w times an
epoch: floor(w) times surely, and what is left of w as a share of its chunks, chosen anew in each epoch, once more.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from rayclip.data.formats import Sample
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.io.storage import join


class MixturePart(NamedTuple):
    """A data set of a mixture: its folder or address, and how often an epoch has each of its samples."""

    path: str
    weight: float


@dataclass(frozen=True, eq=False)
class Mixture:
    """The manifests of the parts, in order, and their weights; to the stream it is what one manifest is."""

    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]

    @classmethod
    def load(cls, parts: Sequence[MixturePart]) -> "Mixture":
        """Read the parts' manifests. Raises UserError for one that is missing, or that is there twice."""
        paths = [part.path for part in parts]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise UserError(f"'{twice}' is twice in data.mixture: give it once, with the sum of its weights")
        return cls(tuple(Manifest.load(path) for path in paths), tuple(part.weight for part in parts))

    def __len__(self) -> int:
        return self._first[-1]

    @cached_property
    def _first(self) -> list[int]:
        """The number of each part's first chunk, and that of all chunks."""
        return np.cumsum([0, *map(len, self.manifests)]).tolist()

    @cached_property
    def num_samples(self) -> np.ndarray:
        """Samples of each chunk, int32 [num_chunks]."""
        return np.concatenate([manifest.num_samples for manifest in self.manifests])

    @cached_property
    def total_samples(self) -> int:
        """Samples in the data sets, each counted once."""
        return sum(manifest.total_samples for manifest in self.manifests)

    @property
    def shares(self) -> tuple[tuple[int, float], ...]:
        """(number of chunks, weight) of each part, which the order is made of."""
        return tuple((len(manifest), weight) for manifest, weight in zip(self.manifests, self.weights, strict=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the parts' digests and weights, in order: two mixtures with one digest give one stream."""
        parts = [[m.digest, float(w)] for m, w in zip(self.manifests, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def subset(self, fraction: float, seed: int) -> "Mixture":
        """So large a share of each part's chunks; see `Manifest.subset`."""
        return replace(self, manifests=tuple(manifest.subset(fraction, seed) for manifest in self.manifests))

    def take(self, chunks: np.ndarray) -> "Mixture":
        """Of these chunks alone, ascending; see `Manifest.take`."""
        edges = np.searchsorted(chunks, self._first)
        own = zip(self.manifests, self._first, itertools.pairwise(edges), strict=False)
        return replace(self, manifests=tuple(m.take(chunks[a:b] - first) for m, first, (a, b) in own))

    def check_shards(self, may_lack: bool = False) -> None:
        """See `Manifest.check_shards`."""
        for manifest in self.manifests:
            manifest.check_shards(may_lack)

    def is_remote(self) -> bool:
        """Whether reading a chunk may mean waiting for a network."""
        return any(manifest.is_remote() for manifest in self.manifests)

    def place(self, chunk: int) -> tuple[str, int]:
        """(shard's name, offset) of a chunk, for messages; among several parts with the shard's folder."""
        manifest, chunk = self._find(chunk)
        shard, offset = manifest.place(chunk)
        return (join(manifest.folder, shard) if len(self.manifests) > 1 else shard), offset

    def read_samples(self, chunk: int, weights: Mapping[str, float], draws: np.ndarray) -> list[Sample]:
        """The samples of one chunk; see `Manifest.read_samples`."""
        manifest, chunk = self._find(chunk)
        return manifest.read_samples(chunk, weights, draws)

    def parts(self) -> list[dict[str, Any]]:
        """Each part's path, weight and number of samples, for records."""
        return [
            part | {"weight": weight}
            for manifest, weight in zip(self.manifests, self.weights, strict=True)
            for part in manifest.parts()
        ]

    def _find(self, chunk: int) -> tuple[Manifest, int]:
        part = int(np.searchsorted(self._first, chunk, side="right")) - 1
        return self.manifests[part], chunk - self._first[part]


def load_parts(folder: str, mixture: Sequence[MixturePart]) -> Manifest | Mixture:
    """The mixture of these parts; without any, the data set in the folder. Raises UserError where one is missing."""
    return Mixture.load(mixture) if mixture else Manifest.load(folder)
