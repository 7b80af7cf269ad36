"""Sequences of one priority class that wait for room, and whose turn it is.

The virtual token counter of Sheng et al., "Fairness in serving large language models" (OSDI 2024): every tenant has
a counter of the work done for it, divided by its weight, and the tenant with the lowest counter goes first. A tenant
that comes back after a pause is lifted to the level of those who wait, less a little credit: the paper gives none, and
then whoever asks now and then, for much less than its share, waits at its second request for what the first one took.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from omnilmm.engine.sequence import Sequence
from omnilmm.messages import GenerateCall

PROMPT_COST = 1.0
OUTPUT_COST = 2.0
"""Per token, as in the paper: a generated token takes a step of its own, prompt tokens share one."""

IDLE_CREDIT = 4096.0
"""How far below those who wait a tenant may come back: a few requests, or one of a full context. It is also the most
that a tenant can ever be ahead of another by having been away."""
FAVOUR = IDLE_CREDIT / 2
"""How far below them a tenant must be for others to make way: it has more than half of the credit left, as one has that
asks for well less than its share."""


class FairQueue:
    """Order of submission within a tenant, fairness between tenants."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Sequence]] = {}  # by tenant, in order of id; no line is empty
        self._counters: dict[str, float] = {}  # one float per tenant ever seen; tenants are the operator's to create
        self._level = 0.0  # the highest that all who wait ever had in common; some may come back below it
        self._last_tenant: str | None = None  # whose line was the last to end

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def num_of(self, tenant: str) -> int:
        """Sequences of a tenant that wait."""
        return len(self._lines.get(tenant, ()))

    def push(self, sequence: Sequence) -> None:
        """Add a sequence at the place its id gives it: a preempted one comes before those submitted after it."""
        tenant = sequence.call.tenant
        if tenant not in self._lines:
            self._counters[tenant] = self._counter(tenant)
            self._level = self._raised_level()
            self._lines[tenant] = []
        insort(self._lines[tenant], sequence, key=lambda waiting: waiting.id)

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.call.tenant
        self._lines[tenant].remove(sequence)
        if not self._lines[tenant]:
            del self._lines[tenant]
            self._last_tenant = tenant

    def in_turn(self, first: str | None = None) -> Iterator[Sequence]:
        """All sequences: those of `first`, and then those of the least served tenant. Not to be changed meanwhile."""

        def rank(tenant: str) -> tuple[bool, float, int]:
            return tenant != first, self._counters[tenant], self._lines[tenant][0].id

        for tenant in sorted(self._lines, key=rank):
            yield from self._lines[tenant]

    def charge(self, sequence: Sequence, *, prompt: int = 0, output: int = 0) -> None:
        """Note that this many tokens are being computed or were drawn for a sequence's tenant."""
        cost = PROMPT_COST * prompt + OUTPUT_COST * output
        self._counters[sequence.call.tenant] += cost / sequence.call.weight

    def fine(self, call: GenerateCall, cost: float) -> None:
        """Charge a call's tenant, which may be about to come, for what others lost by it."""
        self._counters[call.tenant] = self._counter(call.tenant) + cost / call.weight

    def served(self, tenant: str) -> float:
        """A tenant's counter."""
        return self._counters[tenant]

    def is_favoured(self, tenant: str) -> bool:
        """Whether a tenant that is here, or comes now, was served so little that others make way for it."""
        return self._counter(tenant) <= self._raised_level() - FAVOUR

    def _counter(self, tenant: str) -> float:
        """A tenant's counter; of one that has nobody waiting, what it would be if somebody came."""
        if tenant in self._lines:
            return self._counters[tenant]
        return max(self._counters.get(tenant, 0.0), self._raised_level() - IDLE_CREDIT)

    def _raised_level(self) -> float:
        return max(self._level, self._floor())

    def _floor(self) -> float:
        """What everybody who waits was served at least, or the last who did."""
        last = 0.0 if self._last_tenant is None else self._counters[self._last_tenant]
        return min((self._counters[tenant] for tenant in self._lines), default=last)

    def check_integrity(self) -> None:
        """AssertionError if a line is empty, out of order, or unknown to the counters."""
        for tenant, line in self._lines.items():
            ids = [sequence.id for sequence in line]
            assert ids, "an empty line was kept"
            assert ids == sorted(set(ids)), "a line is out of order"
            assert tenant in self._counters, "a tenant waits without a counter"
