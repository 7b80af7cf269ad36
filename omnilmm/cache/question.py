"""Lookups that arrive together ask Redis together.

While one exchange is under way, the keys of all further lookups gather for the next (what databases call group
commit). So a crowd asking for one picture costs two exchanges, not two each, and at most one lookup exchange of this
process is ever under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from omnilmm.cache.flight import Flights, Landing, StoreFlight, StoreLease
from omnilmm.cache.redis import KeyState, RedisTier
from omnilmm.ports import Hit, Lookup


@dataclass(slots=True)
class _Question:
    """One key in one exchange, for all who ask it."""

    answer: asyncio.Future[KeyState | None]
    num_askers: int = 0
    led: Landing | None = None  # of the one asker who took the lead; the others follow, even if it has ended by then


class Questions:
    """Finds keys in Redis, and claims the leases of those that are not there.

    Args:
        redis: whom to ask.
        flights: in whose name leases are claimed, and where they are taken up.
        lease_s: life of a lease that was claimed.
    """

    def __init__(self, redis: RedisTier, flights: Flights, lease_s: float) -> None:
        self._redis = redis
        self._flights = flights
        self._lease_s = lease_s
        self._next: dict[str, _Question] = {}  # gathering
        self._current: dict[str, _Question] = {}  # being asked
        self._strays: list[str] = []  # claimed for nobody, to be given back
        self._asking: asyncio.Task[None] | None = None

    async def ask(self, keys: Sequence[str]) -> dict[str, Lookup]:
        """Hit, lease or flight for each of the distinct `keys`. Where Redis does not say, this process leads."""
        questions = {key: self._enter(key) for key in keys}
        try:
            # All answers first: from there to the return nothing waits, so no lease can be lost to a cancellation.
            await asyncio.wait([question.answer for question in questions.values()])
            return {key: self._settle(key, question) for key, question in questions.items()}
        finally:
            for key, question in questions.items():
                question.num_askers -= 1
                self._sort_out(key, question)

    def _settle(self, key: str, question: _Question) -> Lookup:
        state = question.answer.result()
        if state is not None and state.stored:
            return Hit()
        if question.led is not None:
            return StoreFlight(self._flights, key, question.led)
        lookup = self._flights.take(key, state)
        if isinstance(lookup, StoreLease):
            question.led = lookup.landing
        return lookup

    def _enter(self, key: str) -> _Question:
        question = self._current.get(key) or self._next.get(key)
        if question is None:
            question = self._next[key] = _Question(asyncio.get_running_loop().create_future())
        question.num_askers += 1
        self._wake()
        return question

    def _wake(self) -> None:
        if self._asking is None:
            self._asking = asyncio.create_task(self._run(), name="cache lookup")

    async def _run(self) -> None:
        """Runs while there is anything to ask."""
        try:
            while self._next or self._strays:
                strays, self._strays = self._strays, []
                for key in strays:
                    if not self._flights.can_join(key):
                        await self._redis.drop_lease(key, self._flights.token)
                self._current, self._next = self._next, {}
                states = await self._find_and_claim(list(self._current))
                asked, self._current = self._current, {}
                for key, question in asked.items():
                    question.answer.set_result(states.get(key))
                    self._sort_out(key, question)
        finally:
            self._asking = None
            for question in (*self._current.values(), *self._next.values()):
                question.answer.set_result(None)
            self._current, self._next = {}, {}

    async def _find_and_claim(self, keys: list[str]) -> dict[str, KeyState | None]:
        found = await self._redis.find(keys) if keys else []
        if found is None:
            return {}
        states: dict[str, KeyState | None] = dict.fromkeys(keys, KeyState(stored=True, holder=None))
        missing = [key for key, is_there in zip(keys, found, strict=True) if not is_there]
        claimed = await self._redis.claim(missing, self._flights.token, self._lease_s) if missing else []
        states |= zip(missing, claimed or [None] * len(missing), strict=True)
        return states

    def _sort_out(self, key: str, question: _Question) -> None:
        """Have a claim undone that led to no lease: the value was there after all, or all who asked are gone."""
        if question.num_askers or not question.answer.done():
            return
        state = question.answer.result()
        if state is not None and state.holder == self._flights.token and not self._flights.can_join(key):
            self._strays.append(key)
            self._wake()

    def check_integrity(self) -> None:
        """Assert that nothing is being asked. Call when idle."""
        assert self._asking is None, "questions: still asking"
        left = len(self._current) + len(self._next) + len(self._strays)
        assert left == 0, f"questions: {left} left undone"

    async def aclose(self) -> None:
        """Answer everyone with None, and end."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})
