"""Samples of a data set, part by part, each with its place."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from rayclip.data.formats import Sample
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.orchestration.batch.partitioned_output import plan_parts

Result = TypeVar("Result")


class SamplePlace(NamedTuple):
    """Where a sample is. One that cannot be read has no key."""

    shard: str
    key: str | None
    chunk: int
    row: int

    @property
    def id(self) -> str:
        """Shard name / key; a sample without a key still has an id of its own."""
        return f"{self.shard}/{self.key if self.key is not None else f'#{self.chunk}.{self.row}'}"


class SampleReader:
    """The samples of a data set's parts, in its order. Raises UserError for another data set than the digest's."""

    def __init__(self, folder: str, digest: str, part_samples: int) -> None:
        self.manifest = Manifest.load(folder)
        if self.manifest.digest != digest:
            raise UserError(f"the data set in '{folder}' has changed since the run began")
        self.parts = plan_parts(self.manifest, part_samples)

    def num_before(self, chunk: int) -> int:
        """The number of samples that stand before a chunk."""
        return int(self.manifest.num_samples[:chunk].sum())

    def map(
        self, part: int, function: Callable[[SamplePlace, Sample | str], Result], threads: int = 1
    ) -> Iterator[Result]:
        """Yield what a function returns for every sample of a part, in order.

        It is given a sample's place and its files, or why it cannot be read: "chunk_unreadable", "sample_missing". It
        is called in threads, which are a few chunks ahead and no more.
        """
        waiting: deque[Future[list[Result]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for chunk in self.parts[part]:
                waiting.append(pool.submit(self._map_chunk, chunk, function))
                if len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def _map_chunk(self, chunk: int, function: Callable[[SamplePlace, Sample | str], Result]) -> list[Result]:
        count, shard = int(self.manifest.num_samples[chunk]), self.manifest.shards[self.manifest.shard[chunk]]
        samples: list[Sample | str]
        try:
            samples = [*self.manifest.read_samples(chunk)]
            samples += ["sample_missing"] * (count - len(samples))
        except OSError:
            samples = ["chunk_unreadable"] * count
        return [
            function(SamplePlace(shard, None if isinstance(s, str) else s["__key__"].decode(), chunk, row), s)
            for row, s in enumerate(samples)
        ]
