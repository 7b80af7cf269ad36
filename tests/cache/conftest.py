from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from cache_fakes import PATIENT_S, SECRET, HandClock, Recorder, is_at_rest, until
from fault_proxy import FaultProxy
from redis import Redis

from deployments.redis_server import RedisServer
from omnilmm.cache.codec import Codec
from omnilmm.cache.encoding import Encoding
from omnilmm.cache.redis import RedisTier
from omnilmm.cache.store import TieredStore, open_store
from omnilmm.config import CacheConfig
from omnilmm.messages import Embedding


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def _session_server() -> Iterator[RedisServer]:
    with RedisServer(max_memory_bytes=64 << 20) as server:
        yield server


@pytest.fixture
def server(_session_server: RedisServer) -> RedisServer:
    """A real server, empty. Not to be killed, stopped or configured: take `own_server` for that."""
    with Redis.from_url(_session_server.url) as client:
        client.flushall()
    return _session_server


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A real server for this test alone."""
    with RedisServer(max_memory_bytes=64 << 20) as server:
        yield server


@pytest.fixture
async def proxy(server: RedisServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.url.removeprefix("unix://")) as proxy:
        yield proxy


@pytest.fixture
async def make_tier(recorder: Recorder, clock: HandClock) -> AsyncIterator[Callable[..., RedisTier]]:
    """Makes tiers as separate processes would have them, and closes them."""
    tiers: list[RedisTier] = []

    def make(url: str, *, codec: Codec | None = None, **settings: object) -> RedisTier:
        settings = {"timeout_s": PATIENT_S, **settings}
        tiers.append(RedisTier(url, codec=codec or Codec(SECRET), observer=recorder, clock=clock, **settings))
        return tiers[-1]

    yield make
    try:
        for tier in tiers:
            tier.check_integrity()
    finally:
        for tier in tiers:
            await tier.aclose()


@pytest.fixture
async def make_store(recorder: Recorder, clock: HandClock) -> AsyncIterator[Callable[..., TieredStore]]:
    """Makes stores as separate processes would have them; checks their books and closes them at the end."""
    stores: list[TieredStore] = []

    def make(
        url: str | None, *, sole: bool = False, encoding: Encoding = Encoding.EXACT, **settings: object
    ) -> TieredStore:
        config = CacheConfig(redis_url=url, **{"timeout_s": PATIENT_S, **settings})
        stores.append(open_store(config, secret=SECRET, observer=recorder, clock=clock, sole=sole, encoding=encoding))
        return stores[-1]

    yield make
    try:
        for store in stores:
            await until(lambda store=store: is_at_rest(store))
            store.check_integrity()
    finally:
        for store in stores:
            await store.aclose()


@pytest.fixture
def embedding() -> Embedding:
    """The size of one OmniLMM-12B picture: 64 x 4096 bfloat16, 512 KiB."""
    return Embedding("bfloat16", (64, 4096), bytes(range(256)) * 2048)
