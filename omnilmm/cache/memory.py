"""The tier of this process: values in a dict, bounded in bytes; what leaves is what would be cheapest to make again.

GreedyDual-Size-Frequency (Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching
Policy", HP Labs 1998). An entry is worth

    worth = clock + uses * seconds / bytes

the seconds it spares per byte it takes, counted once for every use. Whoever is worth least leaves, and the clock goes
up to that worth: so the worth of an entry nobody asks for any more falls behind in time, however dear it once was.
Where seconds are not known (0) the order is that of the last use, which is plain LRU.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")

ENTRY_BYTES = 512
"""Counted for each entry on top of its payload: its name, its record and its places in the books."""

_STALE_SLACK = 64


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    num_bytes: int
    seconds: float
    num_uses: int = 0
    worth: float = 0.0
    tick: int = 0  # of its last use; names the one mark in the heap that counts


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
        self._clock = 0.0
        self._tick = 0
        self._entries: dict[str, _Entry[V]] = {}
        self._marks: list[tuple[float, int, str]] = []  # a heap of (worth, tick, key); only the newest of a key counts

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> V | None:
        """The value. Asking for it is a use."""
        entry = self._entries.get(key)
        if entry is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._use(key, entry)
        return entry.value

    def put(self, key: str, value: V, num_bytes: int, *, seconds: float = 0.0) -> bool:
        """Keep `value`; False if it is too big to be kept at all.

        Args:
            key: its name; what stood there before is gone, its uses too.
            value: what to keep.
            num_bytes: of its payload.
            seconds: what it takes to make it again, 0 if nobody knows.
        """
        self.take(key)
        size = num_bytes + ENTRY_BYTES
        if size > self.max_bytes:
            return False
        while self.num_bytes + size > self.max_bytes:
            self._evict()
        entry = self._entries[key] = _Entry(value, size, seconds)
        self.num_bytes += size
        self._use(key, entry)
        return True

    def take(self, key: str) -> V | None:
        """Remove an entry and hand it back."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self.num_bytes -= entry.num_bytes
        self._sweep()
        return entry.value

    def take_all(self) -> None:
        """Remove everything."""
        for key in list(self._entries):
            self.take(key)

    def _use(self, key: str, entry: _Entry[V]) -> None:
        self._tick += 1
        entry.num_uses += 1
        entry.worth = self._clock + entry.num_uses * entry.seconds / entry.num_bytes
        entry.tick = self._tick
        heapq.heappush(self._marks, (entry.worth, entry.tick, key))
        self._sweep()

    def _sweep(self) -> None:
        """Throw old marks away when they are more than the entries."""
        if len(self._marks) > 2 * len(self._entries) + _STALE_SLACK:
            self._marks = [(entry.worth, entry.tick, key) for key, entry in self._entries.items()]
            heapq.heapify(self._marks)

    def _evict(self) -> None:
        """Remove the entry worth least; of equals, the one whose last use is longest ago."""
        while True:
            worth, tick, key = heapq.heappop(self._marks)
            entry = self._entries.get(key)
            if entry is not None and entry.tick == tick:
                break
        self._clock = worth
        self.take(key)
        self.num_evicted += 1

    def check_integrity(self) -> None:
        """Assert that the books agree with the shelves."""
        assert self.num_bytes == sum(e.num_bytes for e in self._entries.values()), "memory tier: bytes miscounted"
        assert self.num_bytes <= max(self.max_bytes, 0), "memory tier: over its bound"
        marks = set(self._marks)
        for key, entry in self._entries.items():
            assert (entry.worth, entry.tick, key) in marks, "memory tier: an entry that can never leave"
        assert len(self._marks) <= 2 * len(self._entries) + _STALE_SLACK, "memory tier: marks pile up"
