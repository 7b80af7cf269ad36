from __future__ import annotations

import asyncio
import math
import struct
import time

import pytest
from cache_fakes import HASTY_S, SECRET, Recorder, is_at_rest, names_in, until
from fault_proxy import FaultProxy
from redis import Redis

from deployments.redis_server import RedisServer
from omnilmm.cache.codec import Codec
from omnilmm.cache.encoding import Encoding
from omnilmm.cache.flight import StoreLease
from omnilmm.cache.memory import ENTRY_BYTES
from omnilmm.cache.store import TieredStore, open_store
from omnilmm.config import CacheConfig
from omnilmm.errors import ConfigError
from omnilmm.messages import Embedding, Encoded, PixelIdentity
from omnilmm.observe import Silent
from omnilmm.ports import EmbeddingStore, Hit

KEY = "emb:" + "0" * 64
OTHER = "emb:" + "1" * 64
ALIAS = "pix:" + "0" * 64
IDENTITY = PixelIdentity(bytes(range(32)), 640, 480)
SMALL = Embedding("float32", (2, 3), bytes(range(24)))


def test_it_is_what_the_flow_asks_for() -> None:
    store: EmbeddingStore = open_store(CacheConfig(), secret=SECRET, observer=Silent(), clock=time)
    assert isinstance(store, TieredStore)


def test_it_can_be_made_before_there_is_a_loop(server: RedisServer) -> None:
    store = open_store(CacheConfig(redis_url=server.url), secret=SECRET, observer=Silent(), clock=time)

    async def use() -> None:
        lease = (await store.lookup([KEY]))[KEY]
        assert await store.put(KEY, SMALL)
        await lease.resolve(Encoded(None, True, 0.1))
        store.check_integrity()
        await store.aclose()

    asyncio.run(use())


def test_a_bad_secret_or_url_is_refused() -> None:
    with pytest.raises(ConfigError):
        open_store(CacheConfig(redis_url="redis://127.0.0.1"), secret=b"short", observer=Silent(), clock=time)
    with pytest.raises(ConfigError):
        open_store(CacheConfig(redis_url="ftp://127.0.0.1"), secret=SECRET, observer=Silent(), clock=time)


async def test_lookup_answers_for_every_distinct_key(server: RedisServer, make_store) -> None:
    store, other_process = make_store(server.url), make_store(server.url)
    in_memory, shared, led, elsewhere, new = (f"emb:{digit}" for digit in "01234")
    await store.put(in_memory, SMALL)
    await other_process.put(shared, SMALL)
    ours = (await store.lookup([led]))[led]
    theirs = (await other_process.lookup([elsewhere]))[elsewhere]

    found = await store.lookup([in_memory, shared, led, elsewhere, new, new])
    assert list(found) == sorted(found) == [in_memory, shared, led, elsewhere, new]
    assert found[in_memory] == found[shared] == Hit()
    assert isinstance(found[new], StoreLease)
    assert not isinstance(found[led], Hit | StoreLease)
    assert not isinstance(found[elsewhere], Hit | StoreLease)
    for lease in (ours, theirs, found[new]):
        await lease.abandon()
    assert names_in(server, "omni:lease:*") == []


async def test_nothing_asked_nothing_found(server: RedisServer, make_store) -> None:
    assert await make_store(server.url).lookup([]) == {}


async def test_what_redis_gave_is_kept_in_memory(server: RedisServer, make_store, recorder: Recorder) -> None:
    writer, reader = make_store(server.url), make_store(server.url)
    assert await writer.put(KEY, SMALL)
    assert await reader.get(KEY) == SMALL
    assert recorder.outcomes("redis") == ["hit"]
    assert await reader.get(KEY) == SMALL
    assert recorder.outcomes("redis") == ["hit"]
    assert recorder.outcomes("memory") == ["miss", "hit"]


async def test_a_store_without_memory_still_shares(server: RedisServer, make_store) -> None:
    vision, decoder = make_store(server.url, memory_bytes=0), make_store(server.url)
    assert await vision.put(KEY, SMALL)
    assert await decoder.get(KEY) == SMALL


async def test_put_tells_whether_the_decoder_can_find_it(proxy: FaultProxy, make_store) -> None:
    shared = make_store(proxy.url)
    assert await shared.put(KEY, SMALL)
    proxy.refuse = True
    proxy.cut()
    assert not await shared.put(OTHER, SMALL)
    assert await shared.get(OTHER) == SMALL  # here it can still be had
    assert not await make_store(None).put(KEY, SMALL)
    assert await make_store(None, sole=True).put(KEY, SMALL)
    assert not await make_store(None, sole=True, memory_bytes=0).put(KEY, SMALL)


async def test_the_seconds_it_took_decide_what_memory_keeps_even_across_processes(
    server: RedisServer, make_store
) -> None:
    vision = make_store(server.url, memory_bytes=0)
    decoder = make_store(server.url, memory_bytes=2 * (len(SMALL.data) + ENTRY_BYTES))
    for key, seconds in (("emb:dear", 5.0), ("emb:cheap", 0.1), ("emb:new", 0.1)):
        assert await vision.put(key, SMALL, seconds=seconds)
        assert await decoder.get(key) == SMALL
    with Redis.from_url(server.url) as client:
        client.flushall()
    assert [await decoder.get(key) for key in ("emb:dear", "emb:cheap", "emb:new")] == [SMALL, None, SMALL]


@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.FP8])
async def test_a_lossy_store_shares_half_the_bytes_and_reads_exact_ones_too(
    encoding: Encoding, server: RedisServer, make_store, embedding: Embedding
) -> None:
    writer, reader = (make_store(server.url, encoding=encoding, memory_bytes=0) for _ in range(2))
    exact = make_store(server.url, memory_bytes=0)
    vectors = Embedding("float32", (8, 512), struct.pack("<4096f", *(math.sin(i) for i in range(4096))))
    assert await writer.put(KEY, vectors)
    assert await exact.put(OTHER, vectors)
    with Redis.from_url(server.url) as client:
        assert client.strlen("omni:" + KEY) < client.strlen("omni:" + OTHER) / 3
    found = await reader.get(KEY)
    assert found != vectors
    assert (found.dtype, found.shape, len(found.data)) == (vectors.dtype, vectors.shape, len(vectors.data))
    assert await reader.get(OTHER) == vectors


async def test_whoever_wants_exact_vectors_gets_no_others(server: RedisServer, make_store, recorder: Recorder) -> None:
    """The operator went back from int8 to exact: what lies there from before is made anew."""
    before, after = make_store(server.url, encoding=Encoding.INT8), make_store(server.url)
    vectors = Embedding("float32", (8, 512), struct.pack("<4096f", *(math.sin(i) for i in range(4096))))
    assert await before.put(KEY, vectors)
    assert await after.get(KEY) is None
    assert recorder.outcomes("redis") == ["bad"]
    lease = (await after.lookup([KEY]))[KEY]
    assert isinstance(lease, StoreLease)
    await lease.abandon()


async def test_vectors_an_encoding_does_not_fit_are_shared_exactly_and_counted(
    server: RedisServer, make_store, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    spiked = Embedding("float32", (1, 64), struct.pack("<64f", 1e6, *[1.0] * 63))
    writer, reader = make_store(server.url, encoding=Encoding.INT8), make_store(server.url, encoding=Encoding.INT8)
    for key in (KEY, OTHER):
        assert await writer.put(key, spiked)
        assert await reader.get(key) == spiked
    assert recorder.outcomes("redis") == ["refused", "hit", "refused", "hit"]
    assert caplog.text.count("int8 encoding does not fit") == 1


async def test_an_alias_spares_the_decoding(server: RedisServer, make_store) -> None:
    one, two = make_store(server.url), make_store(server.url)
    assert await one.get_identity(ALIAS) is None
    await one.put_identity(ALIAS, IDENTITY)
    assert await one.get_identity(ALIAS) == IDENTITY
    assert await two.get_identity(ALIAS) == IDENTITY
    with Redis.from_url(server.url) as client:
        client.flushall()
    assert await two.get_identity(ALIAS) == IDENTITY  # kept in memory
    alone = make_store(None)
    await alone.put_identity(ALIAS, IDENTITY)
    assert await alone.get_identity(ALIAS) == IDENTITY
    assert await alone.get_identity("pix:other") is None


async def test_a_value_stored_between_look_and_claim_is_a_hit(
    server: RedisServer, make_store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the second look this request would encode what was stored a moment ago."""
    leader, late = make_store(server.url), make_store(server.url)
    lease = (await leader.lookup([KEY]))[KEY]
    find = late._redis.find

    async def find_then_leader_ends(keys: list[str]) -> list[bool]:
        answer = await find(keys)
        await leader.put(KEY, SMALL)
        await lease.resolve(Encoded(None, True, 0.1))
        return answer

    monkeypatch.setattr(late._redis, "find", find_then_leader_ends)
    assert (await late.lookup([KEY]))[KEY] == Hit()
    await until(lambda: is_at_rest(late))  # the claim is given back behind the caller's back
    assert names_in(server, "omni:lease:*") == []


async def test_a_lying_server_cannot_keep_a_bad_value_found(server: RedisServer, make_store) -> None:
    store = make_store(server.url)
    with Redis.from_url(server.url) as client:
        client.set("omni:" + KEY, Codec(SECRET).encode(OTHER, SMALL).raw)
    assert (await store.lookup([KEY]))[KEY] == Hit()
    assert await store.get(KEY) is None
    lease = (await store.lookup([KEY]))[KEY]
    assert isinstance(lease, StoreLease)
    await lease.abandon()


async def test_f11_a_hung_server_costs_a_request_one_budget(proxy: FaultProxy, make_store, recorder: Recorder) -> None:
    store = make_store(proxy.url, timeout_s=HASTY_S)
    proxy.black_hole = True
    started = time.monotonic()
    assert await store.get_identity(ALIAS) is None
    lease = (await store.lookup([KEY]))[KEY]
    assert isinstance(lease, StoreLease)
    assert not await store.put(KEY, SMALL)
    await lease.resolve(Encoded(SMALL, False, 0.1))
    assert time.monotonic() - started < 0.3
    assert recorder.outcomes("redis") == ["error", "error", "error"]


async def test_its_books_show_a_lease_left_open(server: RedisServer, make_store) -> None:
    store = make_store(server.url)
    store.check_integrity()
    lease = (await store.lookup([KEY]))[KEY]
    with pytest.raises(AssertionError, match="leases"):
        store.check_integrity()
    await lease.abandon()
    store.check_integrity()


async def test_closing_ends_everything(server: RedisServer, make_store) -> None:
    store, other_process = make_store(server.url), make_store(server.url)
    before = asyncio.all_tasks()
    lease = (await store.lookup([KEY]))[KEY]
    inside = asyncio.create_task((await store.lookup([KEY]))[KEY].wait(60.0))
    theirs = (await other_process.lookup([OTHER]))[OTHER]
    outside = asyncio.create_task((await store.lookup([OTHER]))[OTHER].wait(60.0))
    await asyncio.sleep(0)
    await store.aclose()
    assert [await inside, await outside] == [None, None]
    assert asyncio.all_tasks() - before <= {
        task for task in asyncio.all_tasks() if task.get_name().startswith("heartbeat " + OTHER)
    }
    await lease.resolve(Encoded(None, True, 0.0))  # too late, and harmless
    await theirs.abandon()
    assert names_in(server) == []
