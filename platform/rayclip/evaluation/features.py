"""Features of a data set as files, read a part at a time: what is measured on them never needs all of them at once.

A part's table, a row a picture, in the data set's order:

    id                string           shard name / sample key
    labels            list<int32>      its classes: one, or any number where the data set is multi-label
    image_embedding   float32 [E]      of length 1
    pooled            float32 [W]      before the projection, as linear probes use it
    text_embedding    float32 [T * E]  of its T captions, one after the other; none where no text is asked for
    text_id           int64 [T]        `caption_ids` of them

Shapes: N pictures of one part, M captions of them, E embedding, W width, C classes, P prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rayclip.io.paths import StoragePath, matching, to_read


class LabelledFeatures(NamedTuple):
    """Pictures of one part: ids, features [N, E], and their labels one after the other with the number of each."""

    ids: list[str]
    features_NE: Tensor
    labels: Tensor
    num_labels_N: Tensor

    def targets(self, num_classes: int) -> Tensor:
        """Which classes each picture has, bool [N, C]."""
        targets_NC = torch.zeros(len(self.ids), num_classes, dtype=torch.bool)
        targets_NC[torch.arange(len(self.ids)).repeat_interleave(self.num_labels_N), self.labels] = True
        return targets_NC


class Captioned(NamedTuple):
    """Pictures of one part with their captions: ids, features [N, E] and [M, E], the number of captions of each, and
    each caption's id, by which equal texts are known."""

    ids: list[str]
    image_NE: Tensor
    text_ME: Tensor
    num_texts_N: Tensor
    text_ids_M: Tensor


@dataclass(frozen=True)
class FeatureFolder:
    """The files, once all are written."""

    path: StoragePath

    def images(self, pooled: bool = False) -> Iterator[LabelledFeatures]:
        """Yield the pictures with their labels, part by part; `pooled` gives the features before the projection."""
        column = "pooled" if pooled else "image_embedding"
        for table in self._tables("id", "labels", column):
            labels, counts = _flat(table["labels"])
            features = _rows(table[column], len(table))
            yield LabelledFeatures(table["id"].to_pylist(), features, labels.long(), counts)

    def captioned(self) -> Iterator[Captioned]:
        """Yield the pictures with their captions, part by part."""
        for table in self._tables("id", "image_embedding", "text_embedding", "text_id"):
            image_NE = _rows(table["image_embedding"], len(table))
            texts, lengths = _flat(table["text_embedding"])
            width = image_NE.shape[1]
            texts_ME, text_ids_M = texts.reshape(-1, width), _flat(table["text_id"])[0]
            yield Captioned(table["id"].to_pylist(), image_NE, texts_ME, lengths // width, text_ids_M)

    def texts(self) -> Tensor:
        """Features of prompts, all of them, [P, E]."""
        return torch.cat([_rows(table["text_embedding"], len(table)) for table in self._tables("text_embedding")])

    def _tables(self, *columns: str) -> Iterator[pa.Table]:
        for file in matching(self.path, "part-*.parquet"):
            yield pq.read_table(to_read(file), columns=list(columns))


def _flat(column: pa.ChunkedArray) -> tuple[Tensor, Tensor]:
    """The values of lists one after the other, and the length of each list."""
    lists = column.combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    return torch.tensor(lists.flatten().to_numpy(zero_copy_only=False)), torch.tensor(lengths, dtype=torch.int64)


def _rows(column: pa.ChunkedArray, num_rows: int) -> Tensor:
    return _flat(column)[0].reshape(num_rows, -1)
