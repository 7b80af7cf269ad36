"""One encode per picture, whatever dies. Several stores on one server stand for as many processes."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from cache_fakes import HASTY_S, SECRET, HandClock, is_at_rest, names_in, until
from fault_proxy import FaultProxy
from redis import Redis

from deployments.redis_server import RedisServer
from omnilmm.cache.flight import StoreFlight, StoreLease
from omnilmm.cache.store import TieredStore
from omnilmm.messages import Embedding, Encoded
from omnilmm.ports import Hit

KEY = "emb:" + "0" * 64
OTHER = "emb:" + "1" * 64
SMALL = Embedding("float32", (2, 3), bytes(range(24)))
STORED = Encoded(None, True, 0.1)

DEADLINE_S = 10.0


class CountingEncoder:
    """Encodes when told to, and counts."""

    def __init__(self) -> None:
        self.num_encodes = 0
        self.go = asyncio.Event()

    async def encode(self) -> Embedding:
        self.num_encodes += 1
        await self.go.wait()
        return SMALL


async def fetch(store: TieredStore, encode: Callable[[], Awaitable[Embedding]], key: str = KEY) -> Embedding:
    """What the flow does for one picture."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        found = (await store.lookup([key]))[key]
        if isinstance(found, Hit):
            embedding = await store.get(key)
        elif isinstance(found, StoreLease):
            try:
                embedding = await encode()
            except BaseException:
                await found.abandon()
                raise
            stored = await store.put(key, embedding)
            await found.resolve(Encoded(None if stored else embedding, stored, 0.1))
        else:
            told = await found.wait(until - time.monotonic())
            embedding = None if told is None else told.embedding or await store.get(key)
        if embedding is not None:
            return embedding
    raise TimeoutError


def leases(server: RedisServer) -> list[bytes]:
    return names_in(server, "omni:lease:*")


# -- within one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_redis", [False, True])
async def test_one_process_leads_once(with_redis: bool, server: RedisServer, make_store) -> None:
    store = make_store(server.url if with_redis else None)
    answers = [found[KEY] for found in await asyncio.gather(*(store.lookup([KEY]) for _ in range(50)))]
    (lease,) = (answer for answer in answers if isinstance(answer, StoreLease))
    flights = [answer for answer in answers if isinstance(answer, StoreFlight)]
    assert len(flights) == 49
    early = [asyncio.create_task(flight.wait(DEADLINE_S)) for flight in flights[:25]]
    await asyncio.sleep(0)
    result = Encoded(SMALL, False, 0.1)
    await lease.resolve(result)
    assert [await waiting for waiting in early] == [result] * 25
    assert [await flight.wait(0.0) for flight in flights[25:]] == [result] * 24  # who comes late is not too late
    await lease.abandon()  # a second end does nothing
    again = (await store.lookup([KEY]))[KEY]
    assert isinstance(again, StoreLease)
    await again.abandon()
    assert leases(server) == []


async def test_followers_of_a_leader_that_gives_up_look_again(make_store) -> None:
    store = make_store(None)
    lease = (await store.lookup([KEY]))[KEY]
    waiting = asyncio.create_task((await store.lookup([KEY]))[KEY].wait(DEADLINE_S))
    await asyncio.sleep(0)
    await lease.abandon()
    assert await waiting is None
    follower = (await store.lookup([KEY]))[KEY]
    assert isinstance(follower, StoreLease)
    await follower.abandon()


async def test_an_answer_that_waited_for_another_is_not_stale(
    server: RedisServer, make_store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ask for KEY together; one is held up by a second key while the other leads and lands."""
    store = make_store(server.url)
    find, gates = store._redis.find, [asyncio.Event(), asyncio.Event()]
    to_come = iter(gates)

    async def gated(keys: list[str]) -> list[bool] | None:
        await next(to_come).wait()
        return await find(keys)

    monkeypatch.setattr(store._redis, "find", gated)
    quick = asyncio.create_task(store.lookup([KEY]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # its exchange is under way
    held_up = asyncio.create_task(store.lookup([KEY, OTHER]))
    await asyncio.sleep(0)
    gates[0].set()
    result = Encoded(SMALL, False, 0.1)
    await (await quick)[KEY].resolve(result)
    gates[1].set()
    found = await held_up
    assert isinstance(found[OTHER], StoreLease)
    assert await found[KEY].wait(0.0) == result
    await found[OTHER].abandon()


@pytest.mark.parametrize("with_redis", [False, True])
async def test_a_wait_ends_in_time(with_redis: bool, server: RedisServer, make_store) -> None:
    store = make_store(server.url if with_redis else None)
    follower = make_store(server.url) if with_redis else store
    lease = (await store.lookup([KEY]))[KEY]
    flight = (await follower.lookup([KEY]))[KEY]
    started = time.monotonic()
    assert await flight.wait(0.05) is None
    assert 0.04 < time.monotonic() - started < 1.0
    async with asyncio.timeout(DEADLINE_S):  # should the first one be swallowed on its way through the client
        assert await flight.wait(0.0) is None
    await lease.abandon()


async def test_a_follower_may_leave(server: RedisServer, make_store) -> None:
    leader, follower = make_store(server.url), make_store(server.url)
    lease = (await leader.lookup([KEY]))[KEY]
    flight = (await follower.lookup([KEY]))[KEY]
    one, two = (asyncio.create_task(flight.wait(DEADLINE_S)) for _ in range(2))
    await asyncio.sleep(0.02)
    one.cancel()
    await asyncio.wait({one})
    assert not two.done()
    await leader.put(KEY, SMALL)
    await lease.resolve(STORED)
    assert (await two).stored


async def test_a_lease_lost_by_its_holder_frees_its_followers(server: RedisServer, make_store) -> None:
    store = make_store(server.url, lease_s=0.15)
    lease = (await store.lookup([KEY]))[KEY]
    flight = (await store.lookup([KEY]))[KEY]
    del lease
    gc.collect()
    assert await flight.wait(DEADLINE_S) is None
    again = (await store.lookup([KEY]))[KEY]
    assert isinstance(again, StoreLease)
    await again.abandon()
    assert leases(server) == []


# -- among processes ----------------------------------------------------------------------------------


async def test_f30_two_hundred_requests_over_four_processes_encode_once(server: RedisServer, make_store) -> None:
    stores = [make_store(server.url) for _ in range(4)]
    encoder = CountingEncoder()
    requests = [asyncio.create_task(fetch(stores[number % 4], encoder.encode)) for number in range(200)]
    await until(lambda: encoder.num_encodes > 0)
    await asyncio.sleep(0.1)  # time for anyone else to make the mistake
    encoder.go.set()
    assert await asyncio.gather(*requests) == [SMALL] * 200
    assert encoder.num_encodes == 1
    await until(lambda: all(map(is_at_rest, stores)))
    assert leases(server) == []


async def test_an_instant_encoder_leaves_no_gap_for_a_second_one(server: RedisServer, make_store) -> None:
    stores = [make_store(server.url) for _ in range(4)]
    for number in range(20):
        encoder = CountingEncoder()
        encoder.go.set()
        key = f"emb:{number}"
        await asyncio.gather(*(fetch(stores[index % 4], encoder.encode, key) for index in range(40)))
        assert encoder.num_encodes == 1
    await until(lambda: all(map(is_at_rest, stores)))
    assert leases(server) == []


async def test_without_redis_each_process_encodes_once(proxy: FaultProxy, make_store) -> None:
    proxy.refuse = True
    stores = [make_store(proxy.url) for _ in range(4)]
    encoder = CountingEncoder()
    encoder.go.set()
    answers = await asyncio.gather(*(fetch(stores[number % 4], encoder.encode) for number in range(200)))
    assert answers == [SMALL] * 200
    assert encoder.num_encodes == 4


async def test_waiters_elsewhere_are_woken_by_the_news(
    server: RedisServer, make_store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnilmm.cache.flight.POLL_S", 60.0)  # no poll will save it
    leader, follower = make_store(server.url), make_store(server.url)
    lease = (await leader.lookup([KEY]))[KEY]
    waiting = asyncio.create_task((await follower.lookup([KEY]))[KEY].wait(DEADLINE_S))
    with Redis.from_url(server.url) as client:
        await until(lambda: client.pubsub_numsub("omni:wake")[0][1] == 1)
    await asyncio.sleep(0.05)  # past the poll that follows the subscription
    await leader.put(KEY, SMALL)
    await lease.resolve(STORED)
    told = await waiting
    assert (told.stored, told.embedding) == (True, None)
    assert await follower.get(KEY) == SMALL


async def test_waiters_elsewhere_need_no_news(server: RedisServer, make_store, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = make_store(server.url), make_store(server.url)

    async def refused() -> None:
        return None

    monkeypatch.setattr(follower._redis, "subscribe", refused)
    lease = (await leader.lookup([KEY]))[KEY]
    waiting = asyncio.create_task((await follower.lookup([KEY]))[KEY].wait(DEADLINE_S))
    await asyncio.sleep(0.05)
    await leader.put(KEY, SMALL)
    await lease.resolve(STORED)
    assert (await waiting).stored


async def test_vectors_that_redis_refused_cannot_reach_another_process(server: RedisServer, make_store) -> None:
    leader, follower = make_store(server.url), make_store(server.url)
    lease = (await leader.lookup([KEY]))[KEY]
    waiting = asyncio.create_task((await follower.lookup([KEY]))[KEY].wait(DEADLINE_S))
    await asyncio.sleep(0.05)
    await lease.resolve(Encoded(SMALL, False, 0.1))
    assert await waiting is None
    mine = (await follower.lookup([KEY]))[KEY]
    assert isinstance(mine, StoreLease)
    await mine.abandon()


async def test_a_lease_that_ended_before_the_wait_began_is_noticed(server: RedisServer, make_store) -> None:
    leader, follower = make_store(server.url), make_store(server.url)
    for encoded in (STORED, None):
        lease = (await leader.lookup([KEY]))[KEY]
        flight = (await follower.lookup([KEY]))[KEY]
        if encoded is None:
            await lease.abandon()
        else:
            with Redis.from_url(server.url) as client:
                client.set("omni:" + KEY, b"anything")
                await lease.resolve(encoded)
                assert (await flight.wait(DEADLINE_S)).stored
                client.delete("omni:" + KEY)
                continue
        assert await flight.wait(DEADLINE_S) is None


async def test_news_that_came_between_lookup_and_wait_is_not_missed(
    server: RedisServer, make_store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower already listens, for another picture, and passes over news nobody waits for yet."""
    monkeypatch.setattr("omnilmm.cache.flight.POLL_S", 60.0)
    leader, follower = make_store(server.url), make_store(server.url)
    leases_taken = await leader.lookup([KEY, OTHER])
    flights = await follower.lookup([KEY, OTHER])
    listening = asyncio.create_task(flights[OTHER].wait(DEADLINE_S))
    with Redis.from_url(server.url) as client:
        await until(lambda: client.pubsub_numsub("omni:wake")[0][1] == 1)
    await asyncio.sleep(0.05)
    await leader.put(KEY, SMALL)
    await leases_taken[KEY].resolve(STORED)
    await asyncio.sleep(0.05)  # the news has come and gone
    assert (await flights[KEY].wait(DEADLINE_S)).stored
    await leases_taken[OTHER].abandon()
    assert await listening is None


# -- F31: the leader dies -----------------------------------------------------------------------------


async def test_f31_a_cancelled_leader_is_replaced_at_once(server: RedisServer, make_store) -> None:
    stores = [make_store(server.url) for _ in range(3)]
    encoder = CountingEncoder()
    first = asyncio.create_task(fetch(stores[0], encoder.encode))
    await until(lambda: encoder.num_encodes == 1)
    others = [asyncio.create_task(fetch(stores[number % 3], encoder.encode)) for number in range(60)]
    await asyncio.sleep(0.05)
    assert encoder.num_encodes == 1
    first.cancel()
    await until(lambda: encoder.num_encodes == 2)
    encoder.go.set()
    assert await asyncio.gather(*others) == [SMALL] * 60
    assert encoder.num_encodes == 2
    assert first.cancelled()
    await until(lambda: all(map(is_at_rest, stores)))
    assert leases(server) == []


_LEADER = """
import asyncio, sys, time
from omnilmm.cache.store import open_store
from omnilmm.config import CacheConfig
from omnilmm.observe import Silent

async def lead(url, secret, key, lease_s):
    store = open_store(CacheConfig(redis_url=url, lease_s=lease_s), secret=secret, observer=Silent(), clock=time)
    lease = (await store.lookup([key]))[key]
    print(type(lease).__name__, flush=True)
    await asyncio.sleep(600)

asyncio.run(lead(sys.argv[1], sys.argv[2].encode(), sys.argv[3], float(sys.argv[4])))
"""


async def test_f31_a_killed_leader_is_replaced_when_its_lease_runs_out(server: RedisServer, make_store) -> None:
    lease_s = 0.6
    leader = subprocess.Popen(  # noqa: ASYNC220 - it is to run beside this loop, and be killed
        [sys.executable, "-c", _LEADER, server.url, SECRET.decode(), KEY, str(lease_s)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert await asyncio.to_thread(leader.stdout.readline) == b"StoreLease\n"
        stores = [make_store(server.url, lease_s=lease_s) for _ in range(2)]
        encoder = CountingEncoder()
        encoder.go.set()
        requests = [asyncio.create_task(fetch(stores[number % 2], encoder.encode)) for number in range(40)]
        await asyncio.sleep(2 * lease_s)
        assert encoder.num_encodes == 0  # while it lives, its heartbeat keeps the lease
        leader.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert await asyncio.gather(*requests) == [SMALL] * 40
        assert time.monotonic() - killed < lease_s + 1.0
        assert encoder.num_encodes == 1
        await until(lambda: all(map(is_at_rest, stores)))
        assert leases(server) == []
    finally:
        leader.kill()
        leader.wait()
        leader.stdout.close()


async def test_a_cancelled_lookup_leaves_no_lease_behind(server: RedisServer, make_store) -> None:
    store, other_process = make_store(server.url), make_store(server.url)
    for number in range(40):
        looking = asyncio.create_task(store.lookup([KEY]))
        for _ in range(number):
            await asyncio.sleep(0)
        looking.cancel()
        await asyncio.wait({looking})
        if not looking.cancelled():
            await looking.result()[KEY].abandon()
    await until(lambda: is_at_rest(store))
    assert leases(server) == []
    lease = (await other_process.lookup([KEY]))[KEY]
    assert isinstance(lease, StoreLease)
    await lease.abandon()


# -- Redis fails while a picture is being encoded ------------------------------------------------------


async def test_when_redis_goes_waiters_fend_for_themselves(proxy: FaultProxy, make_store) -> None:
    leader, follower = make_store("unix://" + proxy.upstream), make_store(proxy.url, timeout_s=HASTY_S)
    lease = (await leader.lookup([KEY]))[KEY]
    encoder = CountingEncoder()
    encoder.go.set()
    requests = [asyncio.create_task(fetch(follower, encoder.encode)) for _ in range(20)]
    await asyncio.sleep(0.05)
    assert encoder.num_encodes == 0
    proxy.black_hole = True
    started = time.monotonic()
    assert await asyncio.gather(*requests) == [SMALL] * 20
    assert time.monotonic() - started < 1.5
    assert encoder.num_encodes == 1
    await lease.abandon()


async def test_a_lease_that_could_not_be_given_back_is_ours_to_take_again(
    proxy: FaultProxy, make_store, clock: HandClock
) -> None:
    store = make_store(proxy.url)
    lease = (await store.lookup([KEY]))[KEY]
    proxy.refuse = True
    proxy.cut()
    await lease.abandon()
    await store.get(KEY)  # the second failure: the breaker opens
    proxy.refuse = False
    clock.now += 1.0
    while not store.is_shared:  # until the probe has been answered
        await store.get(KEY)
        await asyncio.sleep(0.001)
    again = (await store.lookup([KEY]))[KEY]
    assert isinstance(again, StoreLease)
    await again.abandon()
    with Redis(unix_socket_path=proxy.upstream) as client:
        assert client.keys("*") == []


async def test_f15_a_flushed_lease_is_taken_again_by_its_heartbeat(server: RedisServer, make_store) -> None:
    leader, follower = make_store(server.url, lease_s=0.3), make_store(server.url)
    lease = (await leader.lookup([KEY]))[KEY]
    with Redis.from_url(server.url) as client:
        client.flushall()
    await until(lambda: leases(server) != [])
    assert isinstance((await follower.lookup([KEY]))[KEY], StoreFlight)
    await lease.abandon()
    assert leases(server) == []


async def test_f15_flushed_at_peak_costs_few_encodes(server: RedisServer, make_store) -> None:
    stores = [make_store(server.url, memory_bytes=0) for _ in range(3)]
    num_encodes: dict[str, int] = {}

    async def one(store: TieredStore, key: str) -> None:
        async def encode() -> Embedding:
            num_encodes[key] = num_encodes.get(key, 0) + 1
            await asyncio.sleep(0.01)
            return SMALL

        assert await fetch(store, encode, key) == SMALL

    requests = [asyncio.create_task(one(stores[number % 3], f"emb:{number % 40}")) for number in range(400)]
    with Redis.from_url(server.url) as client:
        await until(lambda: len(num_encodes) > 20)
        client.flushall()
    await asyncio.gather(*requests)
    assert sum(num_encodes.values()) <= 2 * 40 * 1.05  # the flush makes each needed once more at most
    await until(lambda: all(map(is_at_rest, stores)))
    assert leases(server) == []
