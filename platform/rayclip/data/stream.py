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

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import numpy as np

from rayclip.data.augment import NUM_DRAWS, Augmentation
from rayclip.data.captions import DRAW
from rayclip.data.decode import CAUSES, BadSampleError, crop_image, image_bytes, random_box, read_caption
from rayclip.data.formats import Sample
from rayclip.data.jpeg import Box
from rayclip.data.ledger import Ledger
from rayclip.data.manifest import Manifest
from rayclip.data.memory import reused
from rayclip.data.mixture import Mixture, MixturePart, load_parts
from rayclip.data.order import Order, Shares, blocks, uniform
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError

Batch = dict[str, np.ndarray]

_CHUNKS_IN_FLIGHT = 16


@dataclass(frozen=True)
class StreamSpec:
    """All that the stream depends on beside the ledger. Small and picklable: it travels to every reader."""

    folder: str
    """Of the data set; of a mixture, what it is called in messages."""
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
    augmentation: Augmentation = Augmentation()  # noqa: RUF009 (frozen)
    captions: Mapping[str, float] = field(default_factory=dict)
    """Weights of a sample's captions; see `choose_caption`."""
    mixture: tuple[MixturePart, ...] = ()
    """The parts of a mixture; none: the data set in `folder`, as it is."""


@lru_cache(maxsize=4)
def _manifest(
    folder: str, mixture: tuple[MixturePart, ...], digest: str, fraction: float, seed: int
) -> Manifest | Mixture:
    manifest = load_parts(folder, mixture)
    if manifest.digest != digest:
        raise UserError(f"the data set in '{folder}' has changed since the run began")
    return manifest.subset(fraction, seed)


@lru_cache(maxsize=4)
def _order(seed: int, shares: Shares, window: int) -> Order:
    return Order(seed, shares, window)


@lru_cache(maxsize=1)
def _readers(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CHUNKS_IN_FLIGHT, thread_name_prefix="chunks")


def cut(parts: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """The samples of parts of any sizes as batches of one; the last batch may be smaller."""
    held: list[Batch] = []
    missing = batch_size
    for part in parts:
        while len(part["row"]) >= missing:
            yield _joined([*held, {name: array[:missing] for name, array in part.items()}])
            part = {name: array[missing:] for name, array in part.items()}
            held, missing = [], batch_size
        if len(part["row"]):
            held.append(part)
            missing -= len(part["row"])
    if held:
        yield _joined(held)


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Stream:
    """The samples that `ledger` lacks, in their order. Reading a window needs nothing but the window's number."""

    def __init__(self, spec: StreamSpec, ledger: Mapping[str, object] | None = None) -> None:
        self.spec = spec
        self._ledger = dict(ledger or {"cursor": 0, "partial": {}})

    @classmethod
    def position_at(cls, manifest: Manifest | Mixture, seed: int, samples: int) -> int:
        """The first position of the stream with at least `samples` samples before it."""
        order = Order(seed, manifest.shares)
        epoch, rest = order.find(samples, manifest.num_samples)
        start = epoch * order.num_slots
        if not rest:
            return start
        for positions in blocks(range(start, start + order.num_slots)):
            counts = manifest.num_samples[order.chunks(positions)].cumsum(dtype=np.int64)
            if rest <= counts[-1]:
                break
            rest -= int(counts[-1])
        return int(positions[np.searchsorted(counts, rest)]) + 1

    @property
    def manifest(self) -> Manifest | Mixture:
        """What is read of the data set or the mixture, made once a process."""
        spec = self.spec
        return _manifest(spec.folder, spec.mixture, spec.digest, spec.fraction, spec.seed)

    @property
    def order(self) -> Order:
        """The order of its chunks."""
        return _order(self.spec.seed, self.manifest.shares, self.spec.window)

    def ledger(self) -> Ledger:
        """A ledger that starts from where the stream does."""
        return Ledger.from_dict(self._ledger, self.rows_at)

    @cached_property
    def _done(self) -> Ledger:
        """What is passed over; kept, since with thousands of chunks half done it takes a while to make."""
        return self.ledger()

    def rows_at(self, position: int) -> int:
        """How many samples stand at a position."""
        return int(self.manifest.num_samples[self.order.chunks(np.array([position]))[0]])

    def place_at(self, position: int) -> tuple[str, int]:
        """(shard's name, offset) of the chunk that stands at a position."""
        return self.manifest.place(int(self.order.chunks(np.array([position]))[0]))

    def shard_at(self, position: int) -> str:
        """The name of the shard that stands at a position."""
        return self.place_at(position)[0]

    def windows(self) -> range:
        """The windows that hold anything the ledger lacks."""
        return range(self.ledger().cursor // self.spec.window, -(-self.spec.end // self.spec.window))

    def num_remaining(self) -> int:
        """How many samples the ledger lacks."""
        ledger = self.ledger()
        before_end, before_cursor = (self.samples_before(p) for p in (self.spec.end, ledger.cursor))
        return before_end - before_cursor - ledger.num_done_beyond_cursor()

    def num_distinct(self) -> int:
        """How many different samples the epochs that the stream reaches into hold."""
        if self.order.is_even:
            return self.manifest.total_samples
        held = np.zeros(len(self.manifest), dtype=bool)
        for epoch in range(-(-self.spec.end // self.order.num_slots)):
            held[self.order.slots(epoch)] = True
            if held.all():
                break
        return int(self.manifest.num_samples[held].sum(dtype=np.int64))

    def samples_before(self, position: int) -> int:
        """How many samples stand before a position of the stream."""
        epoch, slots = divmod(position, self.order.num_slots)
        counts = self.manifest.num_samples
        return self.order.samples_before(epoch, counts) + self.order.count(range(position - slots, position), counts)

    def read(self, window: int) -> Batch:
        """All samples of one window that the ledger lacks, in the window's order."""
        ledger = self._done
        positions = self.order.positions(window, self.spec.end)
        remaining = [ledger.remaining_rows(position) for position in positions.tolist()]
        counts = [len(rows) for rows in remaining]
        block = self._rows(reused((sum(counts), self.spec.image_size, self.spec.image_size, 3)))
        position, row = np.repeat(positions, counts), np.concatenate([*remaining, np.empty(0, dtype=np.int32)])
        mixed = self.order.mix_rows(position, row)
        block["position"][:], block["row"][:] = position[mixed], row[mixed]
        places = np.argsort(mixed)  # where each sample goes, in the order in which they are read
        chunks = zip(positions.tolist(), self.order.chunks(positions).tolist(), counts, strict=True)
        fetches = self._fetch_ahead([(position, chunk) for position, chunk, count in chunks if count])
        for rows, fetch in zip([rows for rows in remaining if len(rows)], fetches, strict=True):
            self._read_chunk(fetch, rows, places[: len(rows)], block)
            places = places[len(rows) :]
        block["image"][block["cause"] > 0] = 0
        return block

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The stream in this process, cut into batches; the last one may be smaller."""
        return cut(map(self.read, self.windows()), batch_size)

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
        return self._rows(np.zeros((num_samples, self.spec.image_size, self.spec.image_size, 3), dtype=np.uint8))

    def _rows(self, image: np.ndarray) -> Batch:
        num_samples = len(image)
        return {
            "image": image,
            "tokens": np.zeros((num_samples, self.spec.context_length), dtype=np.int32),
            "num_tokens": np.zeros(num_samples, dtype=np.int32),
            "position": np.full(num_samples, -1, dtype=np.int64),
            "row": np.zeros(num_samples, dtype=np.int32),
            "cause": np.zeros(num_samples, dtype=np.int8),
        }

    def crop(self, data: bytes, choose_box: Callable[[int, int], Box]) -> np.ndarray:
        """From a picture's file to a crop, uint8 [S, S, 3]. Raises BadSampleError."""
        return crop_image(data, choose_box, self.spec.image_size)

    def _read_chunk(
        self, fetch: Callable[[], list[Sample]], rows: np.ndarray, places: np.ndarray, block: Batch
    ) -> None:
        """Read a chunk's `rows` into the block at `places`, where position and row stand already."""
        try:
            samples = fetch()
        except OSError:
            block["cause"][places] = CAUSES.index("chunk_unreadable")
            return
        captions, readable = [], []
        # The area, ratio and place of a sample's crop, then what its augmentation takes.
        draws = uniform(self.spec.seed, block["position"][places, None], rows[:, None], np.arange(4 + NUM_DRAWS))
        for row, place, sample_draws in zip(rows.tolist(), places.tolist(), draws, strict=True):
            try:
                block["image"][place], caption = self._decode(samples, row, sample_draws)
            except BadSampleError as error:
                block["cause"][place] = CAUSES.index(error.cause)
            else:
                captions.append(caption)
                readable.append(place)
        if readable:
            block["tokens"][readable], block["num_tokens"][readable] = get_tokenizer(self.spec.context_length)(captions)

    def _fetch_ahead(self, chunks: list[tuple[int, int]]) -> list[Callable[[], list[Sample]]]:
        """What gives each chunk's samples. Over a network all are under way while the first are being decoded."""
        if not self.manifest.is_remote():
            return [partial(self._fetch, position, chunk) for position, chunk in chunks]
        return [_readers(os.getpid()).submit(self._fetch, position, chunk).result for position, chunk in chunks]

    def _fetch(self, position: int, chunk: int) -> list[Sample]:
        draws = uniform(self.spec.seed, position, np.arange(self.manifest.num_samples[chunk]), DRAW)
        return self.manifest.read_samples(chunk, self.spec.captions, draws)

    def _decode(self, samples: list[Sample], row: int, draws: np.ndarray) -> tuple[np.ndarray, str]:
        if row >= len(samples):
            raise BadSampleError("sample_missing")
        caption, data = read_caption(samples[row]), image_bytes(samples[row])
        choose_box = partial(random_box, scale=self.spec.crop_scale, ratio=self.spec.crop_ratio, draws=draws[:4])
        return self.spec.augmentation.of(self.crop(data, choose_box), draws[4:]), caption
