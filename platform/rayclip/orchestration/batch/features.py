"""Features of data sets and of prompts, extracted by the whole cluster and kept: a second task or run reads them.

A folder of them is named by what they are a function of: the model's weights, the data (or the prompts), the
preprocess. What an interrupted run left is gone on with, as with jobs.embed, whose parts and workers these are.
"""

import hashlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayclip.config import SuiteConfig, WorkersConfig
from rayclip.data.decode import BadSampleError, eval_array, read_captions, read_image
from rayclip.data.formats.tar import Sample
from rayclip.errors import UserError
from rayclip.evaluation.corruptions import corrupt
from rayclip.evaluation.features import FeatureFolder
from rayclip.evaluation.layout import stamp
from rayclip.evaluation.suite import DataSet
from rayclip.io.paths import storage_path
from rayclip.orchestration.batch.embed import Embedder, EmbeddingModel, Read, Reading, shared_encoder, vectors
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, plan_parts
from rayclip.orchestration.batch.task_runner import OutputJob, connect_for, run_jobs
from rayclip.orchestration.cluster.progress import ProgressLine

_PROMPTS_A_PART = 2048


class Extraction(NamedTuple):
    """Features that are to be there."""

    job: OutputJob
    num_samples: int

    @property
    def features(self) -> FeatureFolder:
        """The files, once `extract` has returned."""
        return FeatureFolder(self.job.folder.path)


@dataclass(frozen=True)
class Labels:
    """What a data set's samples must have. Picklable."""

    dataset: str
    num_classes: int
    """0 where nothing is classified."""
    multi: bool
    captions: bool
    corruption: tuple[str, int] | None = None
    """What makes the pictures worse, and how strongly."""


def images_of(
    dataset: DataSet,
    model: EmbeddingModel,
    config: SuiteConfig,
    split: str | None = None,
    corruption: tuple[str, int] | None = None,
) -> Extraction:
    """The features of a data set's pictures, made worse by a corruption of a strength where one is given, and of their
    captions where it has a task that needs them."""
    manifest = dataset.manifest if split is None else dataset.split(split)
    labels = Labels(
        dataset.name,
        len(dataset.class_names),
        dataset.config.labels == "multi",
        "retrieval" in dataset.config.tasks and corruption is None,
        corruption,
    )
    identity = {
        "kind": "features",
        "format": 1,
        "weights_sha256": model.weights_sha256,
        "preprocess": model.identity["preprocess"],
        "source": manifest.folder,
        "source_digest": stamp(manifest),
        "what": "both" if labels.captions else "pictures",
        "num_classes": labels.num_classes,
        "part_samples": config.part_samples,
    }
    if corruption is not None:
        identity["corruption"] = list(corruption)
    workers = config.cluster
    device, threads = _device(workers), max(1, int(workers.cpus_per_worker))
    what = str(identity["what"])
    reading = Reading(manifest.folder, manifest.digest, config.part_samples, what, config.batch_size, threads, device)
    folder = _folder(config, identity, len(plan_parts(manifest, config.part_samples)))
    return Extraction(OutputJob(folder, partial(FeatureReader, model, reading, labels)), manifest.total_samples)


def prompts_of(prompts: Sequence[str], model: EmbeddingModel, config: SuiteConfig) -> Extraction:
    """The features of prompts."""
    identity = {
        "kind": "prompts",
        "format": 1,
        "weights_sha256": model.weights_sha256,
        "source_digest": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "num_prompts": len(prompts),
    }
    folder = _folder(config, identity, -(-len(prompts) // _PROMPTS_A_PART))
    make = partial(PromptEncoder, model, list(prompts), config.batch_size, _device(config.cluster))
    return Extraction(OutputJob(folder, make), len(prompts))


def extract(extractions: Sequence[Extraction], workers: WorkersConfig) -> dict[str, Any]:
    """Write what is missing of all of them, with one pool of workers.

    Returns how many samples were there and are new, and the rate at which. Raises the UserError of a worker.
    """
    folders = [extraction.job.folder for extraction in extractions]
    incomplete = [i for i, folder in enumerate(folders) if folder.read_summary() is None]
    parts = [(i, part) for i in incomplete for part in _missing(folders[i])]
    total = sum(extraction.num_samples for extraction in extractions)
    new, busy_s, started = 0, 0.0, time.monotonic()
    if parts:
        connect_for(workers)
        there = total - sum(extractions[i].num_samples for i in incomplete)
        there += sum(folders[i].missing()[1]["rows"]["samples"] for i in incomplete)
        progress = ProgressLine(total, start=there)
        for _, done in run_jobs([extraction.job for extraction in extractions], workers, parts):
            new += done.tally["rows"]["samples"]
            busy_s += done.seconds
            progress.update(there + new)
        progress.close()
    for i in incomplete:
        folders[i].write_summary({"samples": extractions[i].num_samples, "parts": folders[i].num_parts})
    busy = min(workers.num_workers, len(parts))
    rate = round(new / busy_s * busy, 1) if busy_s else None
    return {
        "samples": total,
        "new_samples": new,
        "samples_per_s": rate,
        "extraction_s": round(time.monotonic() - started, 1),
    }


def _missing(folder: PartitionedOutput) -> list[int]:
    folder.check()
    folder.begin()
    return folder.missing()[0]


def _folder(config: SuiteConfig, identity: dict[str, Any], num_parts: int) -> PartitionedOutput:
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path = storage_path(config.cache) / str(identity["weights_sha256"])[:12] / f"{identity['kind']}-{digest[:16]}"
    return PartitionedOutput(path, identity, num_parts)


def _device(workers: WorkersConfig) -> str:
    return "cuda" if workers.use_gpu else "cpu"


class _Row(NamedTuple):
    """What is kept of one sample."""

    key: str
    labels: list[int]
    captions: list[str]


class FeatureReader(Embedder):
    """Parts of a data set that is measured on: every sample must be there, or the figures say nothing."""

    def __init__(self, model: EmbeddingModel, reading: Reading, labels: Labels) -> None:
        super().__init__(model, reading)
        self.labels = labels

    def _read_sample(self, sample: Sample) -> Read:
        key = sample["__key__"].decode()
        try:
            image = eval_array(read_image(sample), self.image_size)
        except BadSampleError as error:
            raise self._error(f"sample '{key}' cannot be evaluated: {error.cause}") from None
        labels = self._read_labels(key, sample) if self.labels.num_classes else []
        return _Row(key, labels, self._read_captions(key, sample) if self.labels.captions else []), image

    def _read_chunk(self, chunk: int) -> list[Read]:
        rows = super()._read_chunk(chunk)
        if self.labels.corruption is None:
            return rows
        first = int(self.manifest.num_samples[:chunk].sum())
        return [
            (row, None if image is None else corrupt(image, *self.labels.corruption, position))
            for position, (row, image) in enumerate(rows, first)
        ]

    def _unreadable(self, cause: str) -> Read:
        raise self._error(f"'{self.manifest.folder}' cannot be evaluated: {cause}")

    def _read_labels(self, key: str, sample: Sample) -> list[int]:
        name = "npy" if self.labels.multi else "cls"
        try:
            if not self.labels.multi:
                labels, length = [int(sample[name])], None
            else:
                hot = np.load(io.BytesIO(sample[name]), allow_pickle=False)
                labels, length = np.flatnonzero(hot).tolist(), hot.size
        except (KeyError, ValueError, EOFError):
            raise self._error(f"sample '{key}' has no class in a .{name} file") from None
        count = self.labels.num_classes
        if length not in (None, count):
            raise self._error(f"sample '{key}' has targets for {length} classes, the class list names {count}")
        for label in labels:
            if not 0 <= label < count:
                raise self._error(
                    f"sample '{key}' has class {label}, but the class list names {count}: 0 to {count - 1}"
                )
        return labels

    def _read_captions(self, key: str, sample: Sample) -> list[str]:
        try:
            return read_captions(sample)
        except BadSampleError as error:
            needs = "retrieval needs a .txt file with one or more, a line each"
            raise self._error(f"sample '{key}' has no caption ({error.cause}): {needs}") from None

    def _error(self, what: str) -> UserError:
        return UserError(f"data set '{self.labels.dataset}': {what}")

    def _encode_images(self, images: list[np.ndarray]) -> np.ndarray:
        """Features beside those before the projection, float32 [N, E + W]."""
        size = self.image_size
        pixels = np.stack(images) if images else np.empty((0, size, size, 3), dtype=np.uint8)
        return np.concatenate([t.cpu().numpy() for t in self.encoder.encode_pooled(pixels, len(pixels) or 1)], axis=1)

    def _to_part(self, chunks: range, rows: list[_Row], image_features: np.ndarray) -> Part:
        width = self.encoder.model.config.embed_dim
        counts = self.manifest.num_samples[chunks.start : chunks.stop]
        chunk = np.repeat(np.arange(chunks.start, chunks.stop), counts)
        shards = [PurePath(self.manifest.shards[shard]).name for shard in self.manifest.shard[chunk]]
        everything = np.ones(len(rows), dtype=bool)
        captions = [caption for row in rows for caption in row.captions]
        texts = self._encode_texts(captions) if captions else np.empty((0, width), np.float32)
        ends = np.cumsum([0, *(len(row.captions) * width for row in rows)]).astype(np.int32)
        table = pa.table(
            {
                "id": [f"{shard}/{row.key}" for shard, row in zip(shards, rows, strict=True)],
                "labels": pa.array([row.labels for row in rows], pa.list_(pa.int32())),
                "image_embedding": vectors(np.ascontiguousarray(image_features[:, :width]), everything),
                "pooled": vectors(np.ascontiguousarray(image_features[:, width:]), everything),
                "text_embedding": pa.ListArray.from_arrays(ends, texts.ravel()),
            }
        )
        return Part(table, {"rows": {"samples": len(rows), "bad": 0}, "causes": {}})


class PromptEncoder:
    """Parts of a list of prompts."""

    def __init__(self, model: EmbeddingModel, prompts: list[str], batch_size: int, device: str) -> None:
        self._prompts = prompts
        self._batch_size = batch_size
        self._encoder = shared_encoder(model, device)

    def __call__(self, part: int) -> Part:
        """Encode the part."""
        prompts = self._prompts[part * _PROMPTS_A_PART : (part + 1) * _PROMPTS_A_PART]
        features = self._encoder.encode_texts(prompts, self._batch_size).cpu().numpy()
        table = pa.table({"text_embedding": vectors(features, np.ones(len(prompts), dtype=bool))})
        return Part(table, {"rows": {"samples": len(prompts), "bad": 0}, "causes": {}})
