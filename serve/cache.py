"""A least-recently-used cache that is bounded in bytes and counts its hits."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """Keeps what was used last, up to `max_bytes` by `size_of`; what alone is larger is not kept."""

    def __init__(self, max_bytes: int, size_of: Callable[[Value], int]) -> None:
        self._values: LRUCache[Hashable, Value] = LRUCache(max_bytes, getsizeof=size_of)
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return int(self._values.currsize)

    def get(self, key: Hashable) -> Value | None:
        """Return the value, which is now the last used, or None; counted as a hit or a miss."""
        value: Value | None = self._values.get(key)
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def put(self, key: Hashable, value: Value) -> None:
        """Keep the value, and let go of what was used longest ago until all fits."""
        self._values.pop(key, None)
        if self._values.getsizeof(value) <= self._values.maxsize:
            self._values[key] = value

    def drop(self, condition: Callable[[Hashable], bool]) -> None:
        """Let go of every key that meets the condition."""
        for key in [key for key in self._values if condition(key)]:
            del self._values[key]
