"""Features of data sets and of prompts, extracted by the whole cluster and kept: a second task or run reads them.

A folder of them is named by what they are a function of: the model's weights, the data (or the prompts), the
preprocess. What an interrupted run left is gone on with, as with rayclip embed, whose parts and workers these are.
"""

import hashlib
import io
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
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
from rayclip.evaluation.retrieval import caption_ids
from rayclip.evaluation.suite import DataSet
from rayclip.io.paths import storage_path
from rayclip.orchestration.batch.embed import (
    DecodedSample,
    Embedder,
    EmbeddingModel,
    Reading,
    reading_of,
    shared_encoder,
    vectors,
)
from rayclip.orchestration.batch.output_jobs import OutputJob, write_missing
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, plan_parts
from rayclip.orchestration.batch.sample_reader import SamplePlace

_PROMPTS_A_PART = 2048


class Extraction(NamedTuple):
    """Features that are to be there."""

    job: OutputJob
    num_samples: int

    @property
    def features(self) -> FeatureFolder:
        """The files, once `extract` has returned."""
        return FeatureFolder(self.job.output.path)


@dataclass(frozen=True)
class Labels:
    """What a data set's samples must have. Picklable."""

    dataset: str
    num_classes: int
    """0 where nothing is classified."""
    multi: bool
    captions: bool
    corruption: tuple[str, int] | None = None
    """What makes the images worse, and how strongly."""


def images_of(
    dataset: DataSet,
    model: EmbeddingModel,
    config: SuiteConfig,
    split: str | None = None,
    corruption: tuple[str, int] | None = None,
) -> Extraction:
    """Return the extraction of a data set's image features, and of its captions' where it has a task that needs them.

    A `corruption` is (name, strength): the images are made worse by it first.
    """
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
        "format": 2 if labels.captions else 1,  # since 2 with the captions' ids
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
    reading = reading_of(config, manifest.folder, manifest.digest, str(identity["what"]))
    output = _output(config, identity, len(plan_parts(manifest, config.part_samples)))
    return Extraction(OutputJob(output, partial(FeatureReader, model, reading, labels)), manifest.total_samples)


def prompts_of(prompts: Sequence[str], model: EmbeddingModel, config: SuiteConfig) -> Extraction:
    """Return the extraction of the features of prompts."""
    identity = {
        "kind": "prompts",
        "format": 1,
        "weights_sha256": model.weights_sha256,
        "source_digest": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "num_prompts": len(prompts),
    }
    output = _output(config, identity, -(-len(prompts) // _PROMPTS_A_PART))
    make = partial(PromptEncoder, model, list(prompts), config.batch_size, config.cluster.device)
    return Extraction(OutputJob(output, make), len(prompts))


def extract(extractions: Sequence[Extraction], workers: WorkersConfig) -> dict[str, Any]:
    """Write what is missing of all of them, with one pool of workers.

    Returns how many samples were there and are new, and the rate at which. Raises the UserError of a worker.
    """
    total, started = sum(extraction.num_samples for extraction in extractions), time.monotonic()
    incomplete = [extraction for extraction in extractions if extraction.job.output.read_summary() is None]
    jobs, num_left = [extraction.job for extraction in incomplete], sum(each.num_samples for each in incomplete)
    with ExitStack() as writing:
        for job in jobs:
            job.output.check()
            writing.enter_context(job.output.writing())
        _, num_new, rate = write_missing(jobs, workers, num_left, max_bad_fraction=1.0)
        for extraction in incomplete:
            output = extraction.job.output
            output.finish({"samples": extraction.num_samples, "parts": output.num_parts})
    return {
        "samples": total,
        "new_samples": num_new,
        "samples_per_s": rate or None,
        "extraction_s": round(time.monotonic() - started, 1),
    }


def _output(config: SuiteConfig, identity: dict[str, Any], num_parts: int) -> PartitionedOutput:
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path = storage_path(config.cache) / str(identity["weights_sha256"])[:12] / f"{identity['kind']}-{digest[:16]}"
    return PartitionedOutput(path, identity, num_parts)


class _Row(NamedTuple):
    """What is kept of one sample."""

    place: SamplePlace
    labels: list[int]
    captions: list[str]


class FeatureReader(Embedder):
    """Parts of a data set that is measured on: every sample must be there, or the figures say nothing."""

    def __init__(self, model: EmbeddingModel, reading: Reading, labels: Labels) -> None:
        super().__init__(model, reading)
        self.labels = labels

    def _decode(self, place: SamplePlace, sample: Sample | str) -> DecodedSample:
        if isinstance(sample, str):
            raise self._error(f"'{self.reading.folder}' cannot be evaluated: {sample}")
        key = str(place.key)
        try:
            image = eval_array(read_image(sample), self.image_size)
        except BadSampleError as error:
            raise self._error(f"sample '{key}' cannot be evaluated: {error.cause}") from None
        if self.labels.corruption is not None:
            position = self.reader.num_before(place.chunk) + place.row
            image = corrupt(image, *self.labels.corruption, position)
        labels = self._read_labels(key, sample) if self.labels.num_classes else []
        return _Row(place, labels, self._read_captions(key, sample) if self.labels.captions else []), image

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

    def _to_part(self, rows: Sequence[_Row], image_features: np.ndarray) -> Part:
        width = self.encoder.model.config.embed_dim
        everything = np.ones(len(rows), dtype=bool)
        captions = [caption for row in rows for caption in row.captions]
        texts = self._encode_texts(captions) if captions else np.empty((0, width), np.float32)
        ends = np.cumsum([0, *(len(row.captions) * width for row in rows)]).astype(np.int32)
        table = pa.table(
            {
                "id": [f"{PurePath(row.place.shard).name}/{row.place.key}" for row in rows],
                "labels": pa.array([row.labels for row in rows], pa.list_(pa.int32())),
                "image_embedding": vectors(np.ascontiguousarray(image_features[:, :width]), everything),
                "pooled": vectors(np.ascontiguousarray(image_features[:, width:]), everything),
                "text_embedding": pa.ListArray.from_arrays(ends, texts.ravel()),
                "text_id": pa.array([caption_ids(row.captions).tolist() for row in rows], pa.list_(pa.int64())),
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
