"""Least-recently-used caches, bounded in bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """Keeps what was used last, up to `max_bytes` by `size_of`; what alone is larger is not kept."""

    def __init__(self, max_bytes: int, size_of: Callable[[Value], int]) -> None:
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """The value, now the last used, or None; counted as a hit or a miss."""
        value = self._values.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: Value) -> None:
        """Keep the value, and let go of what was used longest ago until all fits."""
        if key in self._values:
            self.num_bytes -= self._size_of(self._values.pop(key))
        self._values[key] = value
        self.num_bytes += self._size_of(value)
        while self.num_bytes > self._max_bytes:
            _, oldest = self._values.popitem(last=False)
            self.num_bytes -= self._size_of(oldest)

    def drop(self, condition: Callable[[Hashable], bool]) -> None:
        """Let go of every key that meets the condition."""
        for key in [key for key in self._values if condition(key)]:
            self.num_bytes -= self._size_of(self._values.pop(key))
