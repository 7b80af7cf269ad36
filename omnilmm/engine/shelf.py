"""Which adapters are in memory, who uses them, and which one goes when room is needed.

Books only: the numbers are in a pool (`models.adapters`), in rank rows that are handed out here, first fit. An adapter
somebody holds is never put away. The shelf takes no lock: its owner (`loop`) lets one thread at a time into all but
`read` and `fill`, which take long and touch no books.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from omnilmm.errors import NotFound, OmniError, Overloaded
from omnilmm.models.adapter_files import AdapterCatalog, AdapterWeights
from omnilmm.ports import Clock

RETRY_AFTER_S = 1.0
RETRY_BROKEN_S = 15.0
"""How long an adapter that could not be read is not looked at again."""


class Pool(Protocol):
    """Where the numbers go: `models.adapters.AdapterPool`."""

    @property
    def num_ranks(self) -> int: ...

    def write(self, ranks: range, weights: AdapterWeights) -> None: ...


@dataclass(eq=False, slots=True)
class Loaded:
    """An adapter in memory. `key` names it and what is in it, so a changed one has another key."""

    name: str
    key: str
    ranks: range
    num_users: int = 0


class AdapterShelf:
    """Adapters by name, the one used longest ago first.

    Args:
        catalog: where they lie.
        read: reads and checks the adapter in a folder.
        pool: what they are put into.
        max_loaded: how many may be in memory, used or not.
    """

    def __init__(
        self,
        catalog: AdapterCatalog,
        read: Callable[[Path], AdapterWeights],
        pool: Pool,
        *,
        max_loaded: int,
        clock: Clock,
    ) -> None:
        self.num_loads = self.num_evictions = 0
        self._catalog = catalog
        self._read = read
        self._pool = pool
        self._max_loaded = max_loaded
        self._clock = clock
        self._loaded: dict[str, Loaded] = {}  # in the order of their last use
        self._promised: list[range] = []  # rows that are being filled
        self._broken: dict[str, float] = {}  # until when

    def names(self) -> tuple[str, ...]:
        """The adapters in memory, the one used longest ago first."""
        return tuple(self._loaded)

    # -- using ----------------------------------------------------------------------------------------

    def try_hold(self, name: str) -> Loaded | None:
        """Use an adapter that is in memory, until `release`. None if it is not.

        Raises:
            OmniError: it was found broken a moment ago.
        """
        loaded = self._loaded.pop(name, None)
        if loaded is not None:
            self._loaded[name] = loaded  # used last
            loaded.num_users += 1
        elif self._broken.get(name, 0.0) > self._clock.monotonic():
            raise unusable()
        return loaded

    def release(self, loaded: Loaded) -> None:
        """One user less."""
        assert loaded.num_users > 0, "an adapter was released more often than held"
        loaded.num_users -= 1

    # -- loading --------------------------------------------------------------------------------------

    def read(self, name: str) -> AdapterWeights:
        """The adapter from its files. ``name@version`` is one whose digest begins so.

        Raises:
            NotFound: there is none of that name, or it is of another version.
            CheckpointError: what is wrong with it.
        """
        plain, _, version = name.partition("@")
        folder = self._catalog.find(plain)
        weights = None if folder is None else self._read(folder)
        if weights is None or not weights.digest.startswith(version):
            raise NotFound(
                "The model does not exist or you do not have access to it.", param="model", code="model_not_found"
            )
        return weights

    def note_broken(self, name: str) -> None:
        """It could not be read: do not try at every request."""
        self._broken[name] = self._clock.monotonic() + RETRY_BROKEN_S

    def take_room(self, rank: int) -> range:
        """So many rank rows that nobody has, putting away what was used longest ago and is not held.

        Raises:
            Overloaded: everything is in use.
        """
        while True:
            ranks = self._find_room(rank)
            if ranks is not None:
                self._promised.append(ranks)
                return ranks
            idle = next((name for name, loaded in self._loaded.items() if not loaded.num_users), None)
            if idle is None:
                raise Overloaded("All room for adapters is in use.", retry_after=RETRY_AFTER_S)
            del self._loaded[idle]
            self.num_evictions += 1

    def fill(self, ranks: range, weights: AdapterWeights) -> None:
        """Put an adapter into rows that `take_room` gave."""
        self._pool.write(ranks, weights)

    def admit(self, name: str, weights: AdapterWeights, ranks: range) -> Loaded:
        """The adapter is in its rows: held once."""
        assert name not in self._loaded, "an adapter was loaded twice"
        self._promised.remove(ranks)
        self._broken.pop(name, None)
        loaded = Loaded(name, f"{name.partition('@')[0]}@{weights.digest[:16]}", ranks, num_users=1)
        self._loaded[name] = loaded
        self.num_loads += 1
        return loaded

    def give_back(self, ranks: range) -> None:
        """Nothing was put into rows that `take_room` gave."""
        self._promised.remove(ranks)

    def _find_room(self, rank: int) -> range | None:
        """The first gap of so many rows, if another adapter may be loaded at all."""
        taken = sorted(self._taken(), key=lambda ranks: ranks.start)
        if len(taken) >= self._max_loaded:
            return None
        begin = 0
        for ranks in (*taken, range(self._pool.num_ranks, self._pool.num_ranks)):
            if ranks.start - begin >= rank:
                return range(begin, begin + rank)
            begin = ranks.stop
        return None

    def _taken(self) -> list[range]:
        return [*(loaded.ranks for loaded in self._loaded.values()), *self._promised]

    # -- books ----------------------------------------------------------------------------------------

    @property
    def num_users(self) -> int:
        return sum(loaded.num_users for loaded in self._loaded.values())

    def check_integrity(self) -> None:
        """AssertionError if rows have two owners, or lie outside the pool."""
        rows = [row for ranks in self._taken() for row in ranks]
        assert len(set(rows)) == len(rows), "rank rows have two owners"
        assert all(0 <= row < self._pool.num_ranks for row in rows), "rank rows outside the pool"
        assert len(self._loaded) <= self._max_loaded, "more adapters are in memory than may be"
        assert all(loaded.num_users >= 0 for loaded in self._loaded.values()), "an adapter has fewer than no users"


def unusable() -> OmniError:
    """What a client is told of a broken adapter: nothing. The operator's log has the reason."""
    return OmniError("an adapter cannot be used")
