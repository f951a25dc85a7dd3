"""Embedding a data set: its pictures and captions through a model's towers, to Parquet parts.

A part's table, a row a sample, in the data set's order:

    id               string          shard name / sample key
    shard, key       string          } the sample's place in the data set
    chunk, row       int64, int32    }
    caption          string          null where there is none, or no text in it
    image_embedding  float32 [E]     of length 1; null where the picture cannot be read, or was not asked for
    text_embedding   float32 [E]     likewise for the caption
    error            string          null, or why something that was asked for could not be read: the picture first

The embeddings are lists of variable length to Arrow: before version 26 it writes lists of fixed length with nulls among
them, but does not read them (apache/arrow#35692).
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayclip.config import ClassifyConfig, EmbedConfig
from rayclip.data.decode import BadSampleError, eval_array, read_caption, read_image
from rayclip.data.formats import Sample
from rayclip.data.manifest import Manifest
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.inference.encoder import Encoder
from rayclip.io.files import find_weights
from rayclip.io.paths import storage_path
from rayclip.io.storage import absolute
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, plan_parts
from rayclip.orchestration.batch.task_runner import run_parts, start
from rayclip.tracking.mlflow import resolve_uri
from rayclip.tracking.registry import ModelSource, is_registered, resolve_model
from rayclip.training.checkpoint import load_model


@dataclass(frozen=True)
class EmbeddingModel:
    """A model that a worker can load, and what is to be known of it before one does. Small and picklable."""

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
        """The model, loaded."""
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
    """Find a model and hold that it loads. Raises UserError."""
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
    folder = PartitionedOutput(path, identity, len(parts))
    done = start(folder, config.cluster)
    if done is not None:
        return done
    reading = reading_of(config, data, manifest.digest, config.what)
    make = partial(Embedder, model, reading)
    return run_parts(folder, make, config.cluster, manifest.total_samples, config.max_bad_fraction)


def reading_of(config: EmbedConfig | ClassifyConfig, folder: str, digest: str, what: str) -> Reading:
    """From the config of a job that reads pictures."""
    workers = config.cluster
    threads, device = max(1, int(workers.cpus_per_worker)), "cuda" if workers.use_gpu else "cpu"
    return Reading(folder, digest, config.part_samples, what, config.batch_size, threads, device)


class _Row(NamedTuple):
    """What is kept of one sample: what is missing has a cause."""

    key: str | None
    caption: str | None
    has_image: bool
    causes: tuple[str, ...]


Read = tuple[Any, np.ndarray | None]
"""What is kept of a sample, and its picture, uint8 [S, S, 3]."""


@lru_cache(maxsize=1)
def shared_encoder(model: EmbeddingModel, device: str) -> Encoder:
    """One a process, also where it works for several outputs."""
    return model.encoder(device)


class Embedder:
    """Parts of a data set, read and embedded. Holds a model: one a process."""

    def __init__(self, model: EmbeddingModel, reading: Reading) -> None:
        self.reading = reading
        self.image_size = model.image_size
        self.manifest = Manifest.load(reading.folder)
        if self.manifest.digest != reading.digest:
            raise UserError(f"the data set in '{reading.folder}' has changed since the run began")
        self.parts = plan_parts(self.manifest, reading.part_samples)
        self.encoder = shared_encoder(model, reading.device)

    def __call__(self, part: int) -> Part:
        """Read the part and embed it."""
        chunks = self.parts[part]
        rows: list[Any] = []
        images: list[np.ndarray] = []
        features: list[np.ndarray] = []
        with ThreadPoolExecutor(self.reading.threads) as pool:
            for row, image in self._read_ahead(pool, chunks):
                rows.append(row)
                if image is not None:
                    images.append(image)
                if len(images) == self.reading.batch_size:
                    features.append(self._encode_images(images))
                    images = []
        features.append(self._encode_images(images))
        return self._to_part(chunks, rows, np.concatenate(features))

    def _read_ahead(self, pool: ThreadPoolExecutor, chunks: Iterable[int]) -> Iterator[Read]:
        """Samples in order; a few chunks are being decoded meanwhile, and no more are held."""
        waiting: deque[Future[list[Read]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(self._read_chunk, chunk))
            if len(waiting) > 2 * self.reading.threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _read_chunk(self, chunk: int) -> list[Read]:
        count = int(self.manifest.num_samples[chunk])
        try:
            samples = self.manifest.read_samples(chunk)[:count]
        except OSError:
            return [self._unreadable("chunk_unreadable")] * count
        rows = [self._read_sample(sample) for sample in samples]
        return rows + [self._unreadable("sample_missing") for _ in range(count - len(rows))]

    def _unreadable(self, cause: str) -> Read:
        return _Row(None, None, False, (cause,)), None

    def _read_sample(self, sample: Sample) -> Read:
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
        return _Row(sample["__key__"].decode(), caption, image is not None, tuple(causes)), image

    def _encode_images(self, images: list[np.ndarray]) -> np.ndarray:
        size = self.image_size
        pixels = np.stack(images) if images else np.empty((0, size, size, 3), dtype=np.uint8)
        return self.encoder.encode_images(pixels, self.reading.batch_size).cpu().numpy()

    def _encode_texts(self, captions: list[str]) -> np.ndarray:
        # Captions repeat themselves; each is encoded once.
        place = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        features = self.encoder.encode_texts(list(place), self.reading.batch_size).cpu().numpy()
        return features[[place[caption] for caption in captions]]

    def _to_part(self, chunks: range, rows: list[Any], image_features: np.ndarray) -> Part:
        counts = self.manifest.num_samples[chunks.start : chunks.stop]
        chunk = np.repeat(np.arange(chunks.start, chunks.stop, dtype=np.int64), counts)
        row = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        shards = [self.manifest.shards[shard] for shard in self.manifest.shard[chunk]]
        # A sample without a key, in a chunk that cannot be read, still has an id of its own.
        keys = [r.key if r.key is not None else f"#{c}.{i}" for r, c, i in zip(rows, chunk, row, strict=True)]
        captions = [r.caption if self.reading.what != "pictures" else None for r in rows]
        with_image = np.array([r.has_image for r in rows])
        with_text = np.array([caption is not None for caption in captions])
        text_features = self._encode_texts([caption for caption in captions if caption is not None])
        table = pa.table(
            {
                "id": [f"{shard}/{key}" for shard, key in zip(shards, keys, strict=True)],
                "shard": shards,
                "key": pa.array([r.key for r in rows], pa.string()),
                "chunk": chunk,
                "row": row,
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
    """A column of N lists from M <= N features, float32 [M, E]: one for each row that is valid, null for the others."""
    offsets = np.concatenate([[0], valid.cumsum()]).astype(np.int32) * features.shape[1]
    return pa.ListArray.from_arrays(offsets, features.ravel(), mask=pa.array(~valid))
