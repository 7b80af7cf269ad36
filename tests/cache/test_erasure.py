"""A picture that is deleted is forgotten everywhere: here, in Redis, and in the memory of every other process."""

from __future__ import annotations

import asyncio

from cache_fakes import until
from redis import Redis

from deployments.redis_server import RedisServer
from omnilmm.cache.erasure import ErasureWatch
from omnilmm.cache.redis import ERASED_MS
from omnilmm.messages import Embedding, PixelIdentity

KEY = "emb:" + "0" * 64
OTHER = "emb:" + "1" * 64
ALIAS = "pix:" + "0" * 64
IDENTITY = PixelIdentity(bytes(range(32)), 640, 480)
SMALL = Embedding("float32", (2, 3), bytes(range(24)))


async def test_every_tier_of_every_process_forgets(server: RedisServer, make_store) -> None:
    ours, theirs = make_store(server.url), make_store(server.url)
    for key in (KEY, OTHER):
        assert await ours.put(key, SMALL)
        assert await theirs.get(key) == SMALL
    await ours.put_identity(ALIAS, IDENTITY)
    assert await theirs.get_identity(ALIAS) == IDENTITY
    assert await ours.erase([KEY, ALIAS])
    with Redis.from_url(server.url) as client:
        assert sorted(client.keys("omni:???:*")) == [f"omni:{OTHER}".encode()]
    assert await ours.get(KEY) is None
    assert await ours.get_identity(ALIAS) is None

    async def have_forgotten() -> bool:
        return await theirs.get(KEY) is None and await theirs.get_identity(ALIAS) is None

    async with asyncio.timeout(30):
        while not await have_forgotten():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.05)
    assert await theirs.get(OTHER) == SMALL


async def test_what_was_made_anew_after_it_was_erased_stays(server: RedisServer, make_tier) -> None:
    tier, dropped = make_tier(server.url), []
    watch = ErasureWatch(tier, dropped.append)
    assert await tier.erase([KEY])
    await watch.look()
    assert dropped == [KEY]
    with Redis.from_url(server.url) as client:  # as if it had been a while ago
        client.zadd("omni:erased", {KEY: 1})
    await watch.look()
    assert dropped == [KEY]


async def test_after_too_long_an_outage_everything_is_dropped(server: RedisServer, make_tier) -> None:
    tier, dropped = make_tier(server.url), []
    watch = ErasureWatch(tier, dropped.append)
    await watch.look()
    assert watch._seen_ms is not None
    watch._seen_ms -= ERASED_MS + 1
    await watch.look()
    assert dropped == [None]


async def test_an_erasure_that_cannot_be_done_says_so(own_server: RedisServer, make_store) -> None:
    store = make_store(own_server.url)
    assert await store.put(KEY, SMALL)
    own_server.stop()
    assert not await store.erase([KEY])
    assert await store.get(KEY) is None  # at least this process forgot
    await until(lambda: not store.is_shared)


async def test_the_list_of_erased_names_does_not_grow_for_ever(server: RedisServer, make_tier) -> None:
    tier = make_tier(server.url)
    with Redis.from_url(server.url) as client:
        client.zadd("omni:erased", {OTHER: 1})
        assert await tier.erase([KEY])
        assert client.zrange("omni:erased", 0, -1) == [KEY.encode()]
