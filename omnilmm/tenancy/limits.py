"""Leaky buckets: how full a tenant's minute is, and whether one more request fits.

A bucket has a level. What a request costs is poured in, and it drains evenly, `limit` in `window_s`. A request is let
in if every bucket it costs something has room for it; if one has not, nothing is poured anywhere. So a tenant may use
a whole minute's worth at once, and on the long run never more than the limit. (The same rule as ATM's generic cell
rate algorithm, ITU-T I.371, told by level instead of by theoretical arrival time: a level keeps its meaning when the
limit changes.)

What an answer takes is known only at its end, so tokens are reserved and corrected. What was poured in too much is
given back less what has drained of it meanwhile: the level afterwards is never below what it would be had the truth
been known from the start.

A request can also have a wish: something it would like and can do without, such as keeping what it makes in the cache.
A wish that does not fit is not poured in, and refuses nobody.

This file is the rule in plain Python, and the books of one process. `shared_limits` is the same rule inside Redis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from omnilmm.ports import Clock

MINUTE_S: Final = 60.0

MAX_BUCKETS: Final = 20_000
"""Buckets that the books of one process hold: of 5000 tenants with a limit of every kind, all in use at once."""
SWEEP_ABOVE: Final = 256
"""With fewer buckets than this nobody looks for those that have drained."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks of one bucket. With `cost` 0 it asks nothing, and is told the level.

    `is_wish`: it can do without. A wish of unknown size (0) fits while there is any room.
    """

    bucket: str
    limit: float
    window_s: float
    cost: float = 0.0
    is_wish: bool = False


@dataclass(frozen=True, slots=True)
class Correction:
    """The truth about one bucket: `surplus` was poured in too much, or, below zero, too little."""

    bucket: str
    limit: float
    window_s: float
    surplus: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to a request.

    `levels` are by bucket, after pouring if it was admitted. `is_crowded`: too many of the tenant's requests run.
    `at` is the time by the clock of whoever decided, in seconds. `denied` are the buckets of wishes that did not fit.
    """

    admitted: bool
    is_crowded: bool
    levels: Mapping[str, float]
    at: float
    denied: frozenset[str] = frozenset()


def drained(level: float, elapsed_s: float, limit: float, window_s: float) -> float:
    """The level after `elapsed_s`. A clock that jumped back drains nothing."""
    return max(0.0, level - max(0.0, elapsed_s) * limit / window_s)


def refund(surplus: float, elapsed_s: float, limit: float, window_s: float) -> float:
    """What of a surplus is still in the bucket `elapsed_s` after it was poured in."""
    return drained(surplus, elapsed_s, limit, window_s)


def fits(level: float, demand: Demand) -> bool:
    """Whether a level leaves room for it."""
    if demand.is_wish:
        return level < demand.limit and level + demand.cost <= demand.limit
    return demand.cost <= 0 or level + demand.cost <= demand.limit


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A level at a time, and when it will have drained, by the limit it was poured under."""

    level: float
    at: float
    empty_at: float


class LocalLimits:
    """The books of one process: all there is where no Redis is, and its share while Redis is away.

    A bucket is kept until it has drained. There are never more than `max_buckets`: where they become too many, those
    that would be empty soonest are forgotten before, which forgives the least.
    """

    def __init__(self, clock: Clock, *, max_buckets: int = MAX_BUCKETS) -> None:
        self._clock = clock
        self._max_buckets = max_buckets
        self._sweep_above = min(SWEEP_ABOVE, max_buckets)
        self._buckets: dict[tuple[str, str], _Bucket] = {}  # by tenant and bucket
        self._running: dict[str, set[str]] = {}

    def admit(
        self, tenant: str, permit: str, demands: Sequence[Demand], *, max_running: int | None, share: float = 1.0
    ) -> Decision:
        """Let the request in, or not. With `share` below 1, only that part of each limit is ours to give.

        A share can be smaller than one honest request. Such a request is let in when its bucket is empty, and the
        bucket then overflows and takes longer to drain: the rate is kept, the burst is one request. A wish is not.
        """
        now = self._clock.monotonic()
        running = self._running.get(tenant, set())
        is_crowded = max_running is not None and len(running) >= max(1, int(max_running * share))
        shares = [replace(demand, limit=demand.limit * share) for demand in demands]
        levels = {demand.bucket: self._level(tenant, demand, now) for demand in shares}
        admitted = not is_crowded and all(
            fits(levels[ours.bucket], ours) or (levels[ours.bucket] <= 0 and ours.cost <= whole.limit)
            for ours, whole in zip(shares, demands, strict=True)
            if not ours.is_wish
        )
        denied = frozenset(wish.bucket for wish in shares if wish.is_wish and not fits(levels[wish.bucket], wish))
        if admitted:
            for demand in shares:
                if demand.cost > 0 and demand.bucket not in denied:
                    levels[demand.bucket] += demand.cost
                    self._note(tenant, demand, levels[demand.bucket], now)
            self._running.setdefault(tenant, set()).add(permit)
        return Decision(admitted, is_crowded, levels, now, denied)

    def settle(
        self, tenant: str, permit: str, admitted_at: float, corrections: Sequence[Correction], *, share: float = 1.0
    ) -> None:
        """The request is over; `corrections` say what it took beyond or below what was poured in."""
        now = self._clock.monotonic()
        for ours in (replace(correction, limit=correction.limit * share) for correction in corrections):
            level = self._level(tenant, ours, now)
            if ours.surplus > 0:
                level = max(0.0, level - refund(ours.surplus, now - admitted_at, ours.limit, ours.window_s))
            else:
                level -= ours.surplus
            self._note(tenant, ours, level, now)
        running = self._running.get(tenant, set())
        running.discard(permit)
        if not running:
            self._running.pop(tenant, None)

    @property
    def num_running(self) -> int:
        return sum(map(len, self._running.values()))

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    def _level(self, tenant: str, demand: Demand | Correction, now: float) -> float:
        bucket = self._buckets.get((tenant, demand.bucket))
        return 0.0 if bucket is None else drained(bucket.level, now - bucket.at, demand.limit, demand.window_s)

    def _note(self, tenant: str, demand: Demand | Correction, level: float, now: float) -> None:
        if level <= 0:
            self._buckets.pop((tenant, demand.bucket), None)
            return
        empty_at = now + level * demand.window_s / demand.limit if demand.limit > 0 else math.inf
        self._buckets[tenant, demand.bucket] = _Bucket(level, now, empty_at)
        if len(self._buckets) > self._sweep_above:
            self._sweep(now)

    def _sweep(self, now: float) -> None:
        """Forget what has drained, and more where that leaves no room for many before the next sweep."""
        full = [entry for entry in self._buckets.items() if entry[1].empty_at > now]
        most = self._max_buckets * 3 // 4
        if len(full) > most:
            full.sort(key=lambda entry: entry[1].empty_at, reverse=True)
            del full[most:]
        self._buckets = dict(full)
        self._sweep_above = min(max(SWEEP_ABOVE, 2 * len(full)), self._max_buckets)
