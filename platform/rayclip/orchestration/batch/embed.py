"""Embedding a data set: its images and captions through a model's towers, to Parquet parts.

A part's table, a row a sample, in the data set's order:

    id               string          shard name / sample key
    shard, key       string          } the sample's place in the data set
    chunk, row       int64, int32    }
    caption          string          null where there is none, or no text in it
    image_embedding  float32 [E]     of length 1; null where the image cannot be read, or was not asked for
    text_embedding   float32 [E]     likewise for the caption
    error            string          null, or why something that was asked for could not be read: the image first

The embeddings are lists of variable length to Arrow: before version 26 it writes lists of fixed length with nulls among
them, but does not read them (apache/arrow#35692).
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayclip.config import ClassifyConfig, EmbedConfig, SuiteConfig
from rayclip.data.decode import BadSampleError, eval_array, read_caption, read_image
from rayclip.data.formats import Sample
from rayclip.data.manifest import Manifest
from rayclip.data.tokenizer import get_tokenizer
from rayclip.inference.encoder import Encoder
from rayclip.io.files import find_weights
from rayclip.io.paths import storage_path
from rayclip.io.storage import absolute
from rayclip.orchestration.batch.output_jobs import OutputJob, run_parts
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, plan_parts
from rayclip.orchestration.batch.sample_reader import SamplePlace, SampleReader
from rayclip.tracking.mlflow import resolve_uri
from rayclip.tracking.model_uri import is_registered
from rayclip.tracking.registry import ModelSource, resolve_model
from rayclip.training.checkpoint import load_model


@dataclass(frozen=True)
class EmbeddingModel:
    """A model that a worker can load, and the facts of it that are needed before one does. Small and picklable."""

    source: ModelSource
    uri: str
    """Names this very version, for machines that do not share the folder."""
    tracking_uri: str
    weights_sha256: str
    image_size: int
    context_length: int
    embed_dim: int
    logit_scale: float

    def encoder(self, device: str) -> Encoder:
        """Load the model onto a device; where its folder is not on this machine it is fetched."""
        there = self.source.folder.exists()
        folder = self.source.folder if there else resolve_model(self.uri, self.tracking_uri).folder
        return Encoder(load_model(folder), get_tokenizer(self.context_length), device)

    @property
    def identity(self) -> dict[str, Any]:
        """What every part says of the model that made it."""
        return {
            "model_version": self.source.version,
            "weights_sha256": self.weights_sha256,
            "embed_dim": self.embed_dim,
            "logit_scale": self.logit_scale,
            "preprocess": f"shorter side to {self.image_size} by PIL's bicubic, then the middle",
        }


def open_model(uri: str, tracking_uri: str | None) -> EmbeddingModel:
    """Find a model and check that it loads. Raises UserError."""
    source = resolve_model(uri, tracking_uri)
    model = load_model(source.folder)
    config = model.config
    tokenizer = get_tokenizer(config.text.context_length)
    with (find_weights(source.folder) or source.folder).open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    pinned = f"models:/{source.version}" if is_registered(uri) else absolute(uri)
    sizes = config.vision.image_size, config.text.context_length, config.embed_dim
    scale = Encoder(model, tokenizer, "cpu").logit_scale
    # A worker has a working folder of its own: the embedded database must be found from there too.
    return EmbeddingModel(source, pinned, resolve_uri(tracking_uri), digest, *sizes, scale)


@dataclass(frozen=True)
class Reading:
    """Which parts of which data set are embedded, and how. Picklable."""

    folder: str
    digest: str
    part_samples: int
    what: str
    batch_size: int
    threads: int
    """Chunks decoded at once, beside the model."""
    device: str


def embed(config: EmbedConfig) -> dict[str, Any]:
    """Embed the data set, or what an interrupted run left of it; a finished output is only reported.

    Returns the summary. Raises UserError for an output that holds something else, and for all that cannot be read.
    """
    job, num_samples = plan_embedding(config)
    return run_parts(job.output, job.make, config.cluster, num_samples, config.max_bad_fraction)


def plan_embedding(config: EmbedConfig) -> tuple[OutputJob, int]:
    """Return what is to be written, and of how many samples. Raises UserError for data or models that do not fit."""
    data, path = absolute(config.data), storage_path(config.output)
    manifest = Manifest.load(data)
    manifest.check_shards()
    model = open_model(config.model, config.tracking_uri)
    parts = plan_parts(manifest, config.part_samples)
    identity = {
        "kind": "embed",
        "format": 1,
        **model.identity,
        "source": data,
        "source_digest": manifest.digest,
        "part_samples": config.part_samples,
        "what": config.what,
    }
    output = PartitionedOutput(path, identity, len(parts))
    make = partial(Embedder, model, reading_of(config, data, manifest.digest, config.what))
    return OutputJob(output, make), manifest.total_samples


def reading_of(config: EmbedConfig | ClassifyConfig | SuiteConfig, folder: str, digest: str, what: str) -> Reading:
    """Return what a job that reads images reads, by its config."""
    workers = config.cluster
    threads = max(1, int(workers.cpus_per_worker))
    return Reading(folder, digest, config.part_samples, what, config.batch_size, threads, workers.device)


class _Row(NamedTuple):
    """What is kept of one sample: what is missing has a cause."""

    place: SamplePlace
    caption: str | None
    has_image: bool
    causes: tuple[str, ...]


DecodedSample = tuple[Any, np.ndarray | None]
"""What is kept of a sample, and its image, uint8 [S, S, 3]."""


@lru_cache(maxsize=1)
def shared_encoder(model: EmbeddingModel, device: str) -> Encoder:
    """Return the loaded model: one a process, also where it works for several outputs."""
    return model.encoder(device)


class Embedder:
    """Parts of a data set, read and embedded. Holds a model: one a process."""

    def __init__(self, model: EmbeddingModel, reading: Reading) -> None:
        self.reading = reading
        self.image_size = model.image_size
        self.reader = SampleReader(reading.folder, reading.digest, reading.part_samples)
        self.encoder = shared_encoder(model, reading.device)

    def __call__(self, part: int) -> Part:
        """Read the part and embed it."""
        rows: list[Any] = []
        images: list[np.ndarray] = []
        features: list[np.ndarray] = []
        for row, image in self.reader.map(part, self._decode, self.reading.threads):
            rows.append(row)
            if image is not None:
                images.append(image)
            if len(images) == self.reading.batch_size:
                features.append(self._encode_images(images))
                images = []
        features.append(self._encode_images(images))
        return self._to_part(rows, np.concatenate(features))

    def _decode(self, place: SamplePlace, sample: Sample | str) -> DecodedSample:
        if isinstance(sample, str):
            return _Row(place, None, False, (sample,)), None
        image, caption = None, None
        causes: list[str] = []
        if self.reading.what != "texts":
            try:
                image = eval_array(read_image(sample), self.image_size)
            except BadSampleError as error:
                causes.append(error.cause)
        try:
            caption = read_caption(sample)
        except BadSampleError as error:
            if self.reading.what != "pictures":
                causes.append(error.cause)
        return _Row(place, caption, image is not None, tuple(causes)), image

    def _encode_images(self, images: list[np.ndarray]) -> np.ndarray:
        size = self.image_size
        pixels = np.stack(images) if images else np.empty((0, size, size, 3), dtype=np.uint8)
        return self.encoder.encode_images(pixels, self.reading.batch_size).cpu().numpy()

    def _encode_texts(self, captions: list[str]) -> np.ndarray:
        # Captions repeat themselves; each is encoded once.
        place = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        features = self.encoder.encode_texts(list(place), self.reading.batch_size).cpu().numpy()
        return features[[place[caption] for caption in captions]]

    def _to_part(self, rows: Sequence[Any], image_features: np.ndarray) -> Part:
        captions = [r.caption if self.reading.what != "pictures" else None for r in rows]
        with_image = np.array([r.has_image for r in rows])
        with_text = np.array([caption is not None for caption in captions])
        text_features = self._encode_texts([caption for caption in captions if caption is not None])
        table = pa.table(
            {
                "id": [r.place.id for r in rows],
                "shard": [r.place.shard for r in rows],
                "key": pa.array([r.place.key for r in rows], pa.string()),
                "chunk": pa.array([r.place.chunk for r in rows], pa.int64()),
                "row": pa.array([r.place.row for r in rows], pa.int32()),
                "caption": pa.array([r.caption for r in rows], pa.string()),
                "image_embedding": vectors(image_features, with_image),
                "text_embedding": vectors(text_features, with_text),
                "error": pa.array([", ".join(r.causes) or None for r in rows], pa.string()),
            }
        )
        numbers = {"samples": len(rows), "bad": sum(bool(r.causes) for r in rows)}
        numbers |= {"pictures": int(with_image.sum()), "texts": int(with_text.sum())}
        return Part(table, {"rows": numbers, "causes": dict(Counter(cause for r in rows for cause in r.causes))})


def vectors(features: np.ndarray, valid: np.ndarray) -> pa.Array:
    """Return a column of N lists from M <= N features, float32 [M, E]: one for each valid row, null for the others."""
    offsets = np.concatenate([[0], valid.cumsum()]).astype(np.int32) * features.shape[1]
    return pa.ListArray.from_arrays(offsets, features.ravel(), mask=pa.array(~valid))
