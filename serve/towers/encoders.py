"""The two towers as deployments: each replica holds the versions that the coordinator wants, and batches for each.

Shapes: N pictures or texts, C classes, E embedding.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from ray.serve.handle import DeploymentHandle

from rayclip.data.tokenizer import get_tokenizer
from rayclip.inference.encoder import Encoder
from rayclip.inference.prompts import fill
from rayclip.inference.zero_shot import class_prompts, mean_of_prompts
from rayclip.serve.cache import LruCache
from rayclip.serve.config import ServeConfig
from rayclip.serve.images import RequestError, decode_image
from rayclip.serve.towers.batching import QueueFullError
from rayclip.serve.towers.tower import Loaded, Tower

BACKGROUND = ""
"""The empty class name: its row is what independent scores are measured against."""


@dataclass
class Encoded:
    """Features of the items that could be read, float32 [N, E] with zeros for the others, and why not, by index."""

    features: np.ndarray
    errors: dict[int, RequestError] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    """Of texts: tokens that were read, start and end included."""
    cut: tuple[int, ...] = ()
    """Texts that are longer than the model reads, by index."""


@dataclass
class ClassMatrix:
    """Rows of the classes, float32 [C, E], and of the background, [E]; the scale that cosines are multiplied by."""

    rows: np.ndarray
    background: np.ndarray
    logit_scale: float
    cut: tuple[int, ...] = ()
    """Classes with a prompt that is longer than the model reads."""

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the rows take."""
        return self.rows.nbytes + self.background.nbytes


class ImageEncoder(Tower[np.ndarray]):
    """Deployment of the image tower: from encoded pictures to features."""

    kind = "image"

    async def __init__(self, config: ServeConfig, coordinator: DeploymentHandle) -> None:  # type: ignore[misc]
        self._decoders = ThreadPoolExecutor(config.image_encoder.decode_threads, "decode")
        self._decoding = 0
        await self._start(config, config.image_encoder, coordinator)

    async def encode(self, version: str, images: Sequence[bytes]) -> Encoded:
        """Features of encoded pictures; one that cannot be read fails alone. Raises RequestError: 429 and 404."""
        loaded = await self._model(version)
        try:
            loaded.queue.check_room(len(images) + self._decoding)
        except QueueFullError:
            raise self._full() from None
        started = time.perf_counter()
        decoded = await self._decode(images, loaded.info.image_size)
        errors = {i: result for i, result in enumerate(decoded) if isinstance(result, RequestError)}
        for error in errors.values():
            self._metrics.broken.labels(error.code).inc()
        queued = time.perf_counter()
        rows = await self._submit(loaded, [result for result in decoded if isinstance(result, np.ndarray)])
        features = np.zeros((len(images), loaded.info.embed_dim), np.float32)
        readable = [i for i in range(len(images)) if i not in errors]
        if readable:
            features[readable] = rows
        tower = self._last_run_s if readable else 0.0
        waited = time.perf_counter() - queued - tower
        return Encoded(features, errors, {"decode": queued - started, "queue": waited, "tower": tower})

    async def _decode(self, images: Sequence[bytes], size: int) -> list[np.ndarray | RequestError]:
        loop = asyncio.get_running_loop()
        self._decoding += len(images)
        try:
            jobs = [
                loop.run_in_executor(self._decoders, decode_or_error, data, size, self._config.limits.max_pixels)
                for data in images
            ]
            return await asyncio.gather(*jobs)
        finally:
            self._decoding -= len(images)

    def _runner(self, encoder: Encoder) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        return lambda images: list(encoder.encode_images(np.stack(images)).cpu().numpy())

    def _probe(self, loaded: Loaded[np.ndarray]) -> np.ndarray:
        return np.zeros((loaded.info.image_size, loaded.info.image_size, 3), np.uint8)


class TextEncoder(Tower[str]):
    """Deployment of the text tower: texts to features, label lists to class matrices, of which rows are kept."""

    kind = "text"

    async def __init__(self, config: ServeConfig, coordinator: DeploymentHandle) -> None:  # type: ignore[misc]
        self._rows: LruCache[np.ndarray] = LruCache(config.cache_bytes, lambda row: row.nbytes)
        await self._start(config, config.text_encoder, coordinator)

    async def encode(self, version: str, texts: Sequence[str]) -> Encoded:
        """Features of texts. Raises RequestError: 429 and 404."""
        loaded = await self._model(version)
        started = time.perf_counter()
        rows, lengths = await asyncio.gather(
            self._submit(loaded, list(texts)), asyncio.to_thread(count_tokens, loaded.encoder, texts)
        )
        most = loaded.encoder.model.context_length
        seconds = {"text": time.perf_counter() - started}
        cut = tuple(np.flatnonzero(lengths > most).tolist())
        return Encoded(np.stack(rows), {}, seconds, int(lengths.clip(max=most).sum()), cut)

    async def class_matrix(self, version: str, labels: Sequence[str], templates: tuple[str, ...]) -> ClassMatrix:
        """The rows of the labels, and of the background, under the templates. Raises RequestError: 429 and 404.

        Only rows that are not known yet cost work: a list that differs by a label costs that label.
        """
        loaded = await self._model(version)
        wanted = list(dict.fromkeys([BACKGROUND, *labels]))
        found = {label: self._rows.get((version, templates, label)) for label in wanted}
        rows = {label: row for label, row in found.items() if row is not None}
        missing = [label for label in wanted if label not in rows]
        if missing:
            prompts, places = class_prompts(missing, templates)
            features = torch.from_numpy(np.stack(await self._submit(loaded, prompts)))
            for label, row in zip(missing, mean_of_prompts(features, places).numpy(), strict=True):
                # A copy: a view would keep its whole matrix alive.
                rows[label] = row.copy()
                self._rows.put((version, templates, label), rows[label])
        matrix = np.stack([rows[label] for label in labels])
        cut = await asyncio.to_thread(labels_cut, loaded.encoder, labels, templates)
        return ClassMatrix(matrix, rows[BACKGROUND], loaded.info.logit_scale, cut)

    def _runner(self, encoder: Encoder) -> Callable[[list[str]], list[np.ndarray]]:
        return lambda texts: list(encoder.encode_texts(texts).cpu().numpy())

    def _probe(self, loaded: Loaded[str]) -> str:
        return "a probe"


def decode_or_error(data: bytes, size: int, max_pixels: int) -> np.ndarray | RequestError:
    """The picture as the tower takes it, or why not."""
    try:
        return decode_image(data, size, max_pixels)
    except RequestError as error:
        return error


def count_tokens(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, start and end included, int32 [N]: of one that is cut, one more than the model reads."""
    return get_tokenizer(encoder.model.context_length + 1)(texts)[1]


def labels_cut(encoder: Encoder, labels: Sequence[str], templates: Sequence[str]) -> tuple[int, ...]:
    """Which labels make a prompt, under one of the templates, that is longer than the model reads."""
    most = encoder.model.context_length
    # A token has a byte at least: plain prompts that are short need no counting.
    suspects = [
        (index, prompt)
        for index, label in enumerate(labels)
        for prompt in (fill(template, label) for template in templates)
        if len(prompt) + 2 > most or not prompt.isascii()
    ]
    if not suspects:
        return ()
    places = np.array([index for index, _ in suspects])
    lengths = count_tokens(encoder, [prompt for _, prompt in suspects])
    return tuple(np.unique(places[lengths > most]).tolist())
