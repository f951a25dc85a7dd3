"""Labelling a data set's images zero-shot, to Parquet parts; from the images, or from embeddings of them.

A part's table, a row a sample, in the data set's order:

    id      string                        shard name / sample key, as in the embeddings
    label   string                        the best label; null where the image cannot be read
    score   float32                       its probability: the softmax over all labels
    top     list<struct<label, score>>    the best of them, best first
    error   string                        null, or why the image cannot be read

Shapes: B images that can be read, C labels, K kept of them, E embedding.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from rayclip.config import ClassifyConfig
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.inference.prompts import resolve_templates
from rayclip.inference.zero_shot import check_class_names, class_matrix, zero_shot_probabilities
from rayclip.io.files import whole_file
from rayclip.io.paths import StoragePath, storage_path, to_read
from rayclip.io.storage import absolute, read_bytes
from rayclip.orchestration.batch.embed import Embedder, EmbeddingModel, open_model, reading_of
from rayclip.orchestration.batch.output_jobs import OutputJob, Work, run_parts
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, open_complete, plan_parts

_CLASSES = "classes.npy"
_ROWS_AT_ONCE = 1024  # of [B, C] probabilities


class _FeatureSource(NamedTuple):
    """Where features of images come from: a data set, or embeddings of one."""

    path: str
    digest: str
    part_samples: int
    num_parts: int
    num_samples: int
    read: Callable[[], Work]


def classify(config: ClassifyConfig) -> dict[str, Any]:
    """Label the images, or what an interrupted run left of them; a finished output is only reported.

    Returns the summary. Raises UserError for labels, templates, embeddings and an output that do not fit.
    """
    job, num_samples, prepare = plan_labelling(config)
    return run_parts(job.output, job.make, config.cluster, num_samples, config.max_bad_fraction, prepare)


def plan_labelling(config: ClassifyConfig) -> tuple[OutputJob, int, Callable[[], None]]:
    """Return what is to be written, of how many samples, and what is to be called before the first part is made.

    Raises UserError for labels, templates, embeddings, data or a model that do not fit or cannot be read.
    """
    labels, templates = read_labels(config.labels), resolve_templates(config.templates)
    check_class_names(labels)
    model = open_model(config.model, config.tracking_uri)
    source = _data_set(config, model) if config.embeddings is None else _embeddings(config, model)
    identity = {
        "kind": "classify",
        "format": 1,
        **model.identity,
        "source": source.path,
        "source_digest": source.digest,
        "part_samples": source.part_samples,
        "templates": templates,
        "num_labels": len(labels),
        "labels_digest": hashlib.sha256(json.dumps([labels, templates]).encode()).hexdigest(),
        "top_k": min(config.top_k, len(labels)),
    }
    output = PartitionedOutput(storage_path(config.output), identity, source.num_parts)
    workers, classes = config.cluster, output.path / _CLASSES

    def prepare() -> None:
        if not classes.is_file():
            arguments = model, labels, templates, classes, workers.device
            # With a thousand labels and many templates it is work for a GPU, and here there may be none.
            on_gpu = ray.remote(num_gpus=1)(_write_classes)
            ray.get(on_gpu.remote(*arguments)) if workers.use_gpu else _write_classes(*arguments)

    make = partial(Classifier, source.read, classes, labels, model.logit_scale, identity["top_k"], workers.device)
    return OutputJob(output, make), source.num_samples, prepare


def read_labels(labels: str | Sequence[str]) -> list[str]:
    """Return the labels, from a list or from a file with one a line. Raises UserError where it cannot be read."""
    if not isinstance(labels, str):
        return list(labels)
    try:
        return read_bytes(labels).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or error
        raise UserError(
            f"labels cannot be read from '{labels}': {why}; give a list, or a file with one a line"
        ) from None


def _data_set(config: ClassifyConfig, model: EmbeddingModel) -> _FeatureSource:
    manifest = Manifest.load(absolute(str(config.data)))
    manifest.check_shards()
    read = partial(Embedder, model, reading_of(config, manifest.folder, manifest.digest, "pictures"))
    num_parts = len(plan_parts(manifest, config.part_samples))
    return _FeatureSource(
        manifest.folder, manifest.digest, config.part_samples, num_parts, manifest.total_samples, read
    )


def _embeddings(config: ClassifyConfig, model: EmbeddingModel) -> _FeatureSource:
    folder, summary = open_complete(storage_path(str(config.embeddings)), "embed")
    made = folder.identity
    if (made["model_version"], made["weights_sha256"]) != (model.source.version, model.weights_sha256):
        same = "other weights under the same name" if made["model_version"] == model.source.version else "another model"
        raise UserError(
            f"the embeddings in '{folder.path}' are by model {made['model_version']}, and '{config.model}' is "
            f"{model.source.version}, {same}: give the model that they are by, or embed again"
        )
    if made["what"] == "texts":
        raise UserError(f"'{folder.path}' holds embeddings of texts alone: embed the pictures to classify them")
    read = partial(_EmbeddingReader, folder)
    return _FeatureSource(
        str(folder.path), made["source_digest"], made["part_samples"], folder.num_parts, summary["samples"], read
    )


class _EmbeddingReader:
    """Reads parts that rayclip embed wrote, where an Embedder makes them."""

    def __init__(self, folder: PartitionedOutput) -> None:
        self._folder = folder

    def __call__(self, part: int) -> Part:
        """Read what a Classifier needs."""
        return Part(pq.read_table(to_read(self._folder.file(part)), columns=["id", "image_embedding", "error"]), {})


def _write_classes(
    model: EmbeddingModel, labels: list[str], templates: Sequence[str], path: StoragePath, device: str
) -> None:
    matrix = class_matrix(model.encoder(device), labels, templates)
    with whole_file(path) as target:
        np.save(target, matrix.cpu().numpy())


class Classifier:
    """From parts of features to parts of labels."""

    def __init__(
        self,
        read: Callable[[], Work],
        classes: StoragePath,
        labels: Sequence[str],
        logit_scale: float,
        top_k: int,
        device: str,
    ) -> None:
        self._read = read()
        self._classes_CE = torch.from_numpy(np.load(to_read(classes))).to(device)
        self._labels = pa.array(labels, pa.string())
        self._logit_scale = logit_scale
        self._top_k = top_k

    def __call__(self, part: int) -> Part:
        """Read the part and label it."""
        table = self._read(part).table
        embeddings = table["image_embedding"].combine_chunks()
        valid = np.asarray(embeddings.is_valid())
        # flatten() leaves out what is null.
        features_BE = embeddings.flatten().to_numpy().reshape(-1, self._classes_CE.shape[1])
        score_BK, index_BK = self._best(features_BE)
        kept = pa.StructArray.from_arrays(
            [self._labels.take(pa.array(index_BK.ravel())), pa.array(score_BK.ravel())], ["label", "score"]
        )
        offsets = (np.concatenate([[0], valid.cumsum()]) * self._top_k).astype(np.int32)
        best = pa.array(_spread(index_BK[:, 0], valid), mask=~valid)
        error = [
            None if there else text.split(", ")[0]
            for text, there in zip(table["error"].to_pylist(), valid, strict=True)
        ]
        result = pa.table(
            {
                "id": table["id"],
                "label": self._labels.take(best),
                "score": pa.array(_spread(score_BK[:, 0], valid), mask=~valid),
                "top": pa.ListArray.from_arrays(offsets, kept, mask=pa.array(~valid)),
                "error": pa.array(error, pa.string()),
            }
        )
        rows = {"samples": len(valid), "bad": int((~valid).sum())}
        counts = Counter(label for label in result["label"].to_pylist() if label is not None)
        return Part(result, {"rows": rows, "causes": dict(Counter(filter(None, error))), "labels": dict(counts)})

    def _best(self, features_BE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 [B, K], falling, and whose they are, int64 [B, K]."""
        scores, indices = [np.empty((0, self._top_k), np.float32)], [np.empty((0, self._top_k), np.int64)]
        for start_at in range(0, len(features_BE), _ROWS_AT_ONCE):
            rows = torch.tensor(features_BE[start_at : start_at + _ROWS_AT_ONCE], device=self._classes_CE.device)
            best = zero_shot_probabilities(rows, self._classes_CE, self._logit_scale).topk(self._top_k)
            scores.append(best.values.cpu().numpy())
            indices.append(best.indices.cpu().numpy())
        return np.concatenate(scores), np.concatenate(indices)


def _spread(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """One value a row, from one a valid row."""
    spread = np.zeros(len(valid), values.dtype)
    spread[valid] = values
    return spread
