"""Measuring a model on data sets, on all workers: each reads its share of the chunks, the counts are summed.

A data set for zero-shot has a class index in each sample's `cls` and the classes' names, a line each, in
`classnames.txt` beside the shards, or beside their folder; one for retrieval has captions, one or more, a line each.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rayclip.config import RetrievalTask, Task, ZeroShotTask
from rayclip.data.decode import BadSampleError, eval_array, read_captions, read_image
from rayclip.data.formats import Sample
from rayclip.data.manifest import Manifest
from rayclip.distributed import fail_together, rank, world_size
from rayclip.errors import UserError
from rayclip.evaluation.contact_sheet import write_contact_sheet
from rayclip.evaluation.retrieval import caption_ids, recall_on_all_workers
from rayclip.evaluation.zero_shot import ZeroShotCounts
from rayclip.inference.encoder import Encoder
from rayclip.inference.zero_shot import class_matrix, zero_shot_probabilities
from rayclip.io.storage import find_file, join, read_bytes

Metrics = dict[str, Any]

_SHEET_SAMPLES = 512
_SHOWN_ANSWERS = 5


@dataclass(frozen=True)
class Evaluator:
    """Runs tasks by name. `image_size` is the model's; `batch_size` pictures are encoded at once."""

    tasks: Mapping[str, Task]
    image_size: int
    batch_size: int

    def check(self) -> None:
        """Raise UserError, before any training, for a task whose data set cannot be used."""
        for name, task in self.tasks.items():
            Manifest.load(task.path).check_shards()
            if isinstance(task, ZeroShotTask) and not class_names(task.path):
                raise UserError(f"task '{name}': '{task.path}/classnames.txt' names no classes")

    def digests(self) -> dict[str, str]:
        """A SHA-256 of what each task measures on: its data set, with the classes' names and templates if it has any.

        Metrics of two models can be compared where these are equal.
        """
        found = {}
        for name, task in self.tasks.items():
            names = class_names(task.path) if isinstance(task, ZeroShotTask) else []
            settings = task.model_dump(mode="json", exclude={"path"})
            content = [settings, names, Manifest.load(task.path).digest]
            found[name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return found

    def run(self, encoder: Encoder, images: Path | None = None) -> dict[str, Metrics]:
        """Every task's metrics by task, the same on all workers, which must all call this.

        Where `images` is a folder, the first worker writes `TASK.png` there for each zero-shot task: right and
        wrong answers.
        """
        return {name: self._run(encoder, task, images and images / f"{name}.png") for name, task in self.tasks.items()}

    def _run(self, encoder: Encoder, task: Task, sheet: Path | None) -> Metrics:
        if isinstance(task, RetrievalTask):
            return _run_retrieval(encoder, self._batches(task.path))
        return _run_zero_shot(encoder, task, self._batches(task.path), sheet)

    def _batches(self, folder: str) -> Iterator["Batch"]:
        return read_batches(Manifest.load(folder), self.image_size, self.batch_size, rank(), world_size())


class Batch(NamedTuple):
    """Pictures uint8 [B, S, S, 3] as the reference preprocess gives them, and their samples, [B]."""

    images: np.ndarray
    samples: list[Sample]


def read_batches(manifest: Manifest, image_size: int, batch_size: int, share: int, shares: int) -> Iterator[Batch]:
    """One share of a data set, in order. Raises UserError for a sample that cannot be read: what is measured
    must be the same for every model."""
    images: list[np.ndarray] = []
    samples: list[Sample] = []
    for chunk in range(share, len(manifest), shares):
        try:
            chunk_samples = manifest.read_samples(chunk)
        except OSError as error:
            shard = manifest.shards[manifest.shard[chunk]]
            raise UserError(f"'{manifest.folder}': shard '{shard}' cannot be evaluated: {error}") from None
        for sample in chunk_samples:
            try:
                images.append(eval_array(read_image(sample), image_size))
            except BadSampleError as error:
                key = sample["__key__"].decode()
                raise UserError(f"'{manifest.folder}': sample '{key}' cannot be evaluated: {error.cause}") from None
            samples.append(sample)
            if len(samples) == batch_size:
                yield Batch(np.stack(images), samples)
                images, samples = [], []
    if samples:
        yield Batch(np.stack(images), samples)


def class_names(folder: str) -> list[str]:
    """The classes of a data set, in order of their index, from its folder or the one above, where CLIP_benchmark's
    users have them. Raises UserError where there is no list."""
    places = [join(place, "classnames.txt") for place in (folder, folder.rstrip("/").rpartition("/")[0] or ".")]
    path = next((place for place in places if find_file(place)), None)
    if path is None:
        raise UserError(f"no 'classnames.txt' in '{folder}': zero-shot needs the classes' names, a line each")
    return read_bytes(path).decode().splitlines()


def _label(sample: Sample, num_classes: int) -> int:
    try:
        label = int(sample["cls"])
    except (KeyError, ValueError):
        raise UserError(f"sample '{sample['__key__'].decode()}' has no class index in a .cls file") from None
    if not 0 <= label < num_classes:
        raise UserError(
            f"sample '{sample['__key__'].decode()}' has class {label}, but classnames.txt names {num_classes}: "
            f"0 to {num_classes - 1}"
        )
    return label


def _run_zero_shot(encoder: Encoder, task: ZeroShotTask, batches: Iterator[Batch], sheet: Path | None) -> Metrics:
    names = class_names(task.path)
    classes = class_matrix(encoder, names, task.templates)
    counts = ZeroShotCounts(classes)
    shown: list[tuple[np.ndarray, ...]] = []
    num_shown = min(_SHOWN_ANSWERS, len(names))
    with fail_together():
        for images, samples in batches:
            labels = torch.tensor([_label(sample, len(names)) for sample in samples])
            features = encoder.encode_images(images, len(images))
            counts.update(features, labels.to(features.device))
            if sheet is not None and sum(len(batch[0]) for batch in shown) < _SHEET_SAMPLES:
                best = zero_shot_probabilities(features, classes, encoder.logit_scale).topk(num_shown)
                shown.append((images, labels.numpy(), best.indices.cpu().numpy(), best.values.cpu().numpy()))
    found = counts.reduce().metrics()
    if sheet is not None and shown and rank() == 0:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        images_N, labels_N, top_NK, probabilities_NK = (np.concatenate(column) for column in zip(*shown, strict=True))
        write_contact_sheet(
            sheet, images_N, labels_N, top_NK, probabilities_NK, names, num_samples=int(found["num_samples"])
        )
    return found


def _run_retrieval(encoder: Encoder, batches: Iterator[Batch]) -> Metrics:
    # A worker that has no share still takes part, with no rows.
    features = [encoder.encode_images(np.empty((0, 1, 1, 3), dtype=np.uint8))]
    captions: list[str] = []
    counts: list[int] = []
    with fail_together():
        for images, samples in batches:
            features.append(encoder.encode_images(images, len(images)))
            for sample in samples:
                own = _captions(sample)
                captions += own
                counts.append(len(own))
    image_features = torch.cat(features)
    text_features = encoder.encode_texts(captions)
    image_of_text = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    device = image_features.device
    return recall_on_all_workers(
        image_features, text_features, image_of_text.to(device), caption_ids(captions).to(device)
    )


def _captions(sample: Sample) -> list[str]:
    try:
        return read_captions(sample)
    except BadSampleError as error:
        raise UserError(f"sample '{sample['__key__'].decode()}' cannot be evaluated: {error.cause}") from None
