"""Small honest stand-ins for the cache's neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from redis import Redis

from deployments.redis_server import RedisServer
from omnilmm.cache.redis import RedisTier
from omnilmm.cache.store import TieredStore
from omnilmm.messages import Embedding
from omnilmm.observe import CacheAsked, Event

SECRET = b"the operator's secret of the tests"

OTHER = "emb:" + "1" * 64
"""The key `works` uses."""

PATIENT_S = 5.0
"""Budget of a tier whose answers a test needs, however busy the machine."""

HASTY_S = 0.05
"""Budget of a tier whose patience is tested: the product's own."""


@dataclass
class Recorder:
    """An observer that keeps what it was told."""

    events: list[Event] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def outcomes(self, tier: str) -> list[str]:
        return [event.outcome for event in self.events if isinstance(event, CacheAsked) and event.tier == tier]


class HandClock:
    """A clock moved by hand: breakers open and stay open until a test lets time pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until `condition` holds; ten seconds are an eternity here."""
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in a server
            await asyncio.sleep(0.001)


def is_at_rest(store: TieredStore) -> bool:
    """What is done behind the callers' backs (a claim given back) is done."""
    try:
        store.check_integrity()
    except AssertionError:
        return False
    return True


def names_in(server: RedisServer, pattern: str = "*") -> list[bytes]:
    """What the server holds."""
    with Redis.from_url(server.url) as client:
        return client.keys(pattern)


async def vectors(tier: RedisTier, key: str) -> Embedding | None:
    found = await tier.get(key)
    return None if found is None else found.embedding


async def works(tier: RedisTier, clock: HandClock, embedding: Embedding) -> None:
    """It stores and finds again; a probe may have to close the breaker first, and a busy machine cost a try."""
    async with asyncio.timeout(10.0):
        while not (await tier.put(OTHER, embedding) and await vectors(tier, OTHER) == embedding):
            clock.now += 1.0
            await asyncio.sleep(0.001)  # the probe needs the loop
    assert not tier.is_down
