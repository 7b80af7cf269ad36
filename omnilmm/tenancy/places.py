"""Room for the answers a router gives at a time, so shared that whoever comes late still finds some.

Dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998):
a tenant may hold twice as many places as are left free. Alone it gets two thirds of them, two greedy ones two fifths
each, and n of them leave 1/(2n+1) for the next one to come. Nobody is asked who the others are, and nothing is kept for
anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from omnilmm.errors import Overloaded, QueueFull

RETRY_AFTER_S = 1.0
GREED = 2
"""Places a tenant may hold for each that is free."""
ENDS_PER_S = 200.0
"""More answers than one router brings to an end in a second. A refusal lasts for as long as all that the tenant holds
would take to end at this rate: nobody's line is empty before its refusal is over."""
MAX_LASTS_S = 0.5
"""But no longer: whoever has room again is let in within this."""


class Places:
    """`num_places` places. Lives on one event loop."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._held: dict[str, int] = {}  # by tenant; nobody holds zero
        self._is_closing = False
        self._all_back = asyncio.Event()  # set once we are closing and nobody holds any

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    @property
    def num_free(self) -> int:
        return self._num_places - sum(self._held.values())

    def refusal(self, tenant: str) -> QueueFull:
        """That the tenant has what it may have, and for how long that can be said without another look."""
        full = QueueFull("Too many answers are being given. Try again in a moment.", retry_after=RETRY_AFTER_S)
        full.lasts_s = min(MAX_LASTS_S, self._held.get(tenant, 0) / ENDS_PER_S)
        return full

    @contextmanager
    def take(self, tenant: str) -> Iterator[None]:
        """A place for as long as the block lasts.

        Raises:
            QueueFull: the tenant holds GREED times as many places as are free.
            Overloaded: no more are given.
        """
        if self._is_closing:
            raise Overloaded("The server is about to stop.", retry_after=RETRY_AFTER_S)
        held = self._held.get(tenant, 0)
        if held >= GREED * self.num_free:
            raise self.refusal(tenant)
        self._held[tenant] = held + 1
        try:
            yield
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]
            self._note_if_all_are_back()

    async def drain(self, timeout_s: float) -> bool:
        """Give no more, and wait until all are back: whether they were in time."""
        self._is_closing = True
        self._note_if_all_are_back()
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_back.wait()
        except TimeoutError:
            return False
        return True

    def _note_if_all_are_back(self) -> None:
        if self._is_closing and not self._held:
            self._all_back.set()

    def check_integrity(self) -> None:
        """AssertionError if the books are wrong."""
        assert all(held > 0 for held in self._held.values()), "places: somebody holds none"
        assert self.num_free >= 0, "places: more were given out than there are"
