"""The tier of this process: values in an ordered dict, the least recently used leave first, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")

ENTRY_BYTES = 512
"""Counted for each entry on top of its payload: its name, its record and its place in the dict."""


class MemoryTier(Generic[V]):
    """A map that never outgrows `max_bytes`. For one event loop; it takes no locks.

    A value bigger than the whole tier is not kept, and `max_bytes` 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self.num_evicted = 0
        self._entries: OrderedDict[str, tuple[V, int]] = OrderedDict()  # oldest use first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> V | None:
        """The value, which thereby becomes the last to leave."""
        entry = self._entries.get(key)
        if entry is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: str, value: V, num_bytes: int) -> bool:
        """Keep `value`, whose payload is `num_bytes`; False if it is too big to be kept at all."""
        self.take(key)
        cost = num_bytes + ENTRY_BYTES
        if cost > self.max_bytes:
            return False
        while self.num_bytes + cost > self.max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self.num_bytes -= freed
            self.num_evicted += 1
        self._entries[key] = (value, cost)
        self.num_bytes += cost
        return True

    def take(self, key: str) -> V | None:
        """Remove an entry and hand it back."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self.num_bytes -= entry[1]
        return entry[0]

    def check_integrity(self) -> None:
        """Assert that the books agree with the shelves."""
        assert self.num_bytes == sum(cost for _, cost in self._entries.values()), "memory tier: bytes miscounted"
        assert self.num_bytes <= max(self.max_bytes, 0), "memory tier: over its bound"
