"""The stream of a training run: what the ledger lacks, window by window, as arrays.

Everything here is plain Python: Ray Data calls `Stream.read` for one window after another, a test or a machine
without Ray iterates over `Stream.batches`.

A batch is a dict of arrays over its samples:

    image       uint8 [B, S, S, 3]  RGB
    tokens      int32 [B, <=77]     zero padded, end token present
    num_tokens  int32 [B]           0 where the sample could not be read: it is accounted for, not trained on
    position    int64 [B]           } the sample's identity for the ledger; position -1 is padding
    row         int32 [B]           }
    cause       int8  [B]           why it could not be read, an index into decode.CAUSES
"""

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from rayclip.data.decode import CAUSES, BadSampleError, crop_to_array, random_box, read_caption, read_image
from rayclip.data.formats.tar import Sample, read_samples
from rayclip.data.ledger import Ledger
from rayclip.data.manifest import Manifest
from rayclip.data.order import Order, uniform
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class StreamSpec:
    """All that the stream depends on beside the ledger. Small and picklable: it travels to every reader."""

    folder: str
    digest: str
    seed: int
    end: int
    """Position at which the stream stops."""
    window: int
    image_size: int
    context_length: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    fraction: float = 1.0
    """Share of the data set's chunks that the stream is made of; `digest` is of the whole."""


@lru_cache(maxsize=4)
def _manifest(folder: str, digest: str, fraction: float, seed: int) -> Manifest:
    manifest = Manifest.load(folder)
    if manifest.digest != digest:
        raise UserError(f"the data set in '{folder}' has changed since the run began")
    return manifest.subset(fraction, seed)


@lru_cache(maxsize=4)
def _order(seed: int, num_chunks: int, window: int) -> Order:
    return Order(seed, num_chunks, window)


class Stream:
    """The samples that `ledger` lacks, in their order. Reading a window needs nothing but the window's number."""

    def __init__(self, spec: StreamSpec, ledger: Mapping[str, object] | None = None) -> None:
        self.spec = spec
        self._ledger = dict(ledger or {"cursor": 0, "partial": {}})

    @classmethod
    def position_at(cls, manifest: Manifest, seed: int, samples: int) -> int:
        """The first position of the stream with at least `samples` samples before it."""
        epochs, rest = divmod(samples, manifest.total_samples)
        order = Order(seed, len(manifest))
        start = epochs * len(manifest)
        counts = manifest.num_samples[order.chunks(np.arange(start, start + len(manifest)))]
        return start + int(np.searchsorted(counts.cumsum(), rest)) + 1 if rest else start

    @property
    def manifest(self) -> Manifest:
        """The manifest of what is read of the data set, made once a process."""
        return _manifest(self.spec.folder, self.spec.digest, self.spec.fraction, self.spec.seed)

    @property
    def order(self) -> Order:
        """The order of its chunks."""
        return _order(self.spec.seed, len(self.manifest), self.spec.window)

    def ledger(self) -> Ledger:
        """A ledger that starts from where the stream does."""
        return Ledger.from_dict(self._ledger, self.rows_at)

    def rows_at(self, position: int) -> int:
        """How many samples stand at a position."""
        return int(self.manifest.num_samples[self.order.chunks(np.array([position]))[0]])

    def windows(self) -> range:
        """The windows that hold anything the ledger lacks."""
        return range(self.ledger().cursor // self.spec.window, -(-self.spec.end // self.spec.window))

    def num_remaining(self) -> int:
        """How many samples the ledger lacks."""
        ledger = self.ledger()
        before_end, before_cursor = (self.samples_before(p) for p in (self.spec.end, ledger.cursor))
        return before_end - before_cursor - ledger.num_done_beyond_cursor()

    def samples_before(self, position: int) -> int:
        """How many samples stand before a position of the stream."""
        epochs, slots = divmod(position, len(self.manifest))
        last = self.order.chunks(np.arange(position - slots, position))
        return epochs * self.manifest.total_samples + int(self.manifest.num_samples[last].sum())

    def read(self, window: int) -> Batch:
        """All samples of one window that the ledger lacks, in the window's order."""
        ledger = self.ledger()
        blocks = []
        positions = self.order.positions(window, self.spec.end)
        for position, chunk in zip(positions.tolist(), self.order.chunks(positions).tolist(), strict=True):
            rows = ledger.remaining_rows(position)
            if len(rows):
                blocks.append(self._read_chunk(position, chunk, rows))
        if not blocks:
            return self.padding(0)
        block = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
        mixed = self.order.mix_rows(block["position"], block["row"])
        return {name: array[mixed] for name, array in block.items()}

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The stream in this process, cut into batches; the last one may be smaller."""
        held = self.padding(0)
        for window in self.windows():
            block = self.read(window)
            held = {name: np.concatenate([held[name], block[name]]) for name in held}
            while len(held["row"]) >= batch_size:
                yield {name: array[:batch_size] for name, array in held.items()}
                held = {name: array[batch_size:] for name, array in held.items()}
        if len(held["row"]):
            yield held

    def again(self, samples: np.ndarray, batch_size: int, share: int, shares: int) -> Iterator[Batch]:
        """One share of samples that came before, int64 [n, 2] of (position, row), in as many batches as each share.

        A share that has fewer samples ends with padding.
        """
        wanted: dict[int, int] = {}
        for position, row in samples[share::shares].tolist():
            wanted[position] = wanted.get(position, 0) | 1 << row
        start, end = min(wanted, default=0), max(wanted, default=-1) + 1
        done = {p: (1 << self.rows_at(p)) - 1 & ~wanted.get(p, 0) for p in range(start, end)}
        ledger = {"cursor": start, "partial": {str(p): f"{mask:x}" for p, mask in done.items()}}
        batches = Stream(replace(self.spec, end=end), ledger).batches(batch_size)
        largest_share = -(-len(samples) // shares)
        for _ in range(-(-largest_share // batch_size)):
            yield next(batches, self.padding(1))

    def padding(self, num_samples: int) -> Batch:
        """Rows that stand for no sample; the loop passes over them."""
        size = self.spec.image_size
        return {
            "image": np.zeros((num_samples, size, size, 3), dtype=np.uint8),
            "tokens": np.zeros((num_samples, self.spec.context_length), dtype=np.int32),
            "num_tokens": np.zeros(num_samples, dtype=np.int32),
            "position": np.full(num_samples, -1, dtype=np.int64),
            "row": np.zeros(num_samples, dtype=np.int32),
            "cause": np.zeros(num_samples, dtype=np.int8),
        }

    def _read_chunk(self, position: int, chunk: int, rows: np.ndarray) -> Batch:
        block = self.padding(len(rows))
        block["position"][:] = position
        block["row"][:] = rows
        try:
            samples = read_samples(self.manifest.read_chunk(chunk))
        except (OSError, tarfile.TarError):
            block["cause"][:] = CAUSES.index("chunk_unreadable")
            return block
        captions, readable = [], []
        # Four draws a sample: the area, ratio and place of its crop.
        draws = uniform(self.spec.seed, position, rows[:, None], np.arange(4))
        for i, row in enumerate(rows.tolist()):
            try:
                block["image"][i], caption = self._decode(samples, row, draws[i])
            except BadSampleError as error:
                block["cause"][i] = CAUSES.index(error.cause)
            else:
                captions.append(caption)
                readable.append(i)
        if readable:
            block["tokens"][readable], block["num_tokens"][readable] = get_tokenizer(self.spec.context_length)(captions)
        return block

    def _decode(self, samples: list[Sample], row: int, draws: np.ndarray) -> tuple[np.ndarray, str]:
        if row >= len(samples):
            raise BadSampleError("sample_missing")
        caption = read_caption(samples[row])
        image = read_image(samples[row])
        box = random_box(image.width, image.height, self.spec.crop_scale, self.spec.crop_ratio, draws)
        return crop_to_array(image, box, self.spec.image_size), caption
