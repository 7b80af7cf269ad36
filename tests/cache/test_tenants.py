"""Why timing tells a tenant nothing about another's pictures: asking for one of those *is* a miss, command by command.

tests/bench/timing_probe.py measures the same at a running server with a stopwatch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
from cache_fakes import SECRET, Recorder, is_at_rest, until
from redis import Redis

from deployments.redis_server import RedisServer
from omnilmm.cache.flight import StoreLease
from omnilmm.cache.key import KeyRing
from omnilmm.cache.store import TieredStore
from omnilmm.messages import Embedding, Encoded, PixelIdentity
from omnilmm.ports import Hit

SMALL = Embedding("float32", (2, 3), bytes(range(24)))


@dataclass
class Service:
    """Router, vision and decoder of a cluster as far as the cache sees them: two stores and an encoder that counts."""

    router: TieredStore
    decoder: TieredStore
    keys: KeyRing = field(default_factory=lambda: KeyRing(SECRET))
    num_decoded: int = 0
    num_encoded: int = 0

    async def ask(self, file: bytes, scope: str) -> None:
        digest = hashlib.sha256(file).digest()
        alias = self.keys.alias_key(digest, scope=scope, decoding="1")
        identity = await self.router.get_identity(alias)
        if identity is None:
            self.num_decoded += 1
            identity = PixelIdentity(digest, 1, 1)
            await self.router.put_identity(alias, identity)
        key = self.keys.embedding_key(
            identity, scope=scope, family="f", fingerprint="w", preprocessing="1", dtype="float32"
        )
        found = (await self.router.lookup([key]))[key]
        if isinstance(found, StoreLease):
            self.num_encoded += 1
            assert await self.router.put(key, SMALL, seconds=0.1)
            await found.resolve(Encoded(None, stored=True, seconds=0.1))
        else:
            assert found == Hit()
        assert await self.decoder.get(key) == SMALL


@dataclass(frozen=True)
class Trace:
    """All that could take time: commands Redis ran, tiers asked, pictures decoded and encoded."""

    commands: Counter[str]
    outcomes: tuple[str, ...]
    num_decoded: int
    num_encoded: int


@pytest.fixture
def service(server: RedisServer, make_store) -> Service:
    return Service(make_store(server.url), make_store(server.url))


async def trace(service: Service, server: RedisServer, recorder: Recorder, file: bytes, scope: str) -> Trace:
    recorder.events.clear()
    service.num_decoded = service.num_encoded = 0
    with Redis.from_url(server.url) as client:
        client.config_resetstat()
        await service.ask(file, scope)
        await until(lambda: is_at_rest(service.router) and is_at_rest(service.decoder))
        # what each store asks once a second, whoever is served: TIME and ZRANGEBYSCORE
        steady = ("cmdstat_time", "cmdstat_zrangebyscore")
        told = client.info("commandstats").items()
        commands = Counter({name: about["calls"] for name, about in told if name not in steady})
    outcomes = tuple(f"{event.tier} {event.outcome} {event.num_bytes}" for event in recorder.events)
    return Trace(commands, outcomes, service.num_decoded, service.num_encoded)


async def test_anothers_picture_takes_exactly_the_way_of_a_new_one(
    service: Service, server: RedisServer, recorder: Recorder
) -> None:
    new = await trace(service, server, recorder, b"first", "alice")
    assert (new.num_decoded, new.num_encoded) == (1, 1)
    anothers = await trace(service, server, recorder, b"first", "bob")
    brand_new = await trace(service, server, recorder, b"second", "bob")
    assert anothers == brand_new == new

    own = await trace(service, server, recorder, b"first", "alice")
    assert own != new, "the test can see a hit"
    assert (own.num_decoded, own.num_encoded) == (0, 0)


async def test_nothing_a_tenant_stores_is_named_like_anything_of_anothers(
    service: Service, server: RedisServer
) -> None:
    names = {}
    for scope in ("alice", "bob"):
        with Redis.from_url(server.url) as client:
            client.flushall()
            await service.ask(b"first", scope)
            names[scope] = set(client.keys("*"))
    assert len(names["alice"]) == len(names["bob"]) == 2
    assert not names["alice"] & names["bob"]
