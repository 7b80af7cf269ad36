"""The shared tier on a real server, and on servers that fail in every way an operator may meet."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from cache_fakes import HASTY_S, OTHER, SECRET, HandClock, Recorder, until, vectors, works
from fault_proxy import FaultProxy
from redis import Redis

import omnilmm.cache.redis
from deployments.redis_server import RedisServer
from omnilmm.cache.codec import Codec
from omnilmm.cache.redis import RedisTier, read_wake
from omnilmm.messages import Embedding, Encoded, PixelIdentity

T = TypeVar("T")

KEY = "emb:" + "0" * 64
ALIAS = "pix:" + "0" * 64
NAME = "omni:" + KEY
IDENTITY = PixelIdentity(bytes(range(32)), 640, 480)

SOON_S = 0.3
"""One budget is 50 ms; the rest is room for a busy machine. A client without bounds takes seconds."""


async def timed(answer: Awaitable[T]) -> tuple[T, float]:
    started = time.monotonic()
    return await answer, time.monotonic() - started


@contextmanager
def admin(server: RedisServer) -> Iterator[Redis]:
    """The operator's own client."""
    with Redis.from_url(server.url) as client:
        yield client


# -- a server that works ------------------------------------------------------------------------------


async def test_values_come_back(server: RedisServer, make_tier, recorder: Recorder, embedding: Embedding) -> None:
    writer, reader = make_tier(server.url), make_tier(server.url, ttl_s=5.0)
    assert await writer.put(KEY, embedding)
    assert (await reader.get(KEY)).embedding == embedding
    assert await reader.get(OTHER) is None
    assert await writer.put_identity(ALIAS, IDENTITY)
    assert await reader.get_identity(ALIAS) == IDENTITY
    assert await reader.find([KEY, OTHER]) == [True, False]
    assert recorder.outcomes("redis") == ["hit", "miss", "hit", "hit", "miss"]
    assert recorder.events[0].num_bytes > len(embedding.data)


async def test_every_value_expires(server: RedisServer, make_tier, embedding: Embedding) -> None:
    tier = make_tier(server.url, ttl_s=5.0)
    await tier.put(KEY, embedding)
    await tier.put_identity(ALIAS, IDENTITY)
    await tier.claim([OTHER], b"me", 5.0)
    with admin(server) as client:
        names = client.keys("*")
        assert len(names) == 3
        assert all(name.startswith(b"omni:") and 0 < client.pttl(name) <= 5000 for name in names)


async def test_leases_name_one_holder(server: RedisServer, make_tier) -> None:
    one, two = make_tier(server.url), make_tier(server.url)
    (first,) = await one.claim([KEY], b"one", 5.0)
    (second,) = await two.claim([KEY], b"two", 5.0)
    assert (first.holder, second.holder) == (b"one", b"one")
    await two.end_lease(KEY, b"two", stored=False)  # not its to end
    await two.drop_lease(KEY, b"two")
    await two.keep_lease(KEY, b"two", 50.0)
    assert (await two.look([KEY]))[0].holder == b"one"
    await one.end_lease(KEY, b"one", stored=False)
    assert (await two.look([KEY]))[0].holder is None


async def test_a_heartbeat_prolongs_a_lease_and_restores_a_lost_one(server: RedisServer, make_tier) -> None:
    tier = make_tier(server.url)
    await tier.claim([KEY], b"me", 5.0)
    with admin(server) as client:
        await tier.keep_lease(KEY, b"me", 50.0)
        assert client.pttl("omni:lease:" + KEY) > 5000
        client.flushall()
        await tier.keep_lease(KEY, b"me", 50.0)
        assert client.get("omni:lease:" + KEY) == b"me"


async def test_a_lease_taken_over_between_look_and_delete_is_left_alone(server: RedisServer, make_tier) -> None:
    tier = make_tier(server.url)
    await tier.claim([KEY], b"me", 5.0)
    with admin(server) as client:
        for _ in range(30):
            # Both at once: whichever comes first, the new holder's lease must survive.
            client.set("omni:lease:" + KEY, b"me")
            ending = asyncio.create_task(tier.end_lease(KEY, b"me", stored=False))
            await asyncio.sleep(0)
            client.set("omni:lease:" + KEY, b"another")
            await ending
            assert client.get("omni:lease:" + KEY) == b"another"


async def test_the_end_of_a_lease_is_news(server: RedisServer, make_tier) -> None:
    tier = make_tier(server.url)
    news = await tier.subscribe()
    await tier.claim([KEY], b"me", 5.0)
    await tier.end_lease(KEY, b"me", stored=True)
    wake = read_wake(await news.next(5.0))
    assert (wake.key, wake.stored) == (KEY, True)
    await tier.end_lease(KEY, b"me", stored=False)
    assert not read_wake(await news.next(5.0)).stored
    await news.aclose()


@pytest.mark.parametrize("message", [b"", b"2emb:0", b"\xff\xfe"])
def test_other_messages_are_no_news(message: bytes) -> None:
    assert read_wake(message) is None


async def test_the_documented_acl_user_is_enough(own_server: RedisServer, make_tier, embedding: Embedding) -> None:
    with admin(own_server) as client:
        line = re.search(r"ACL SETUSER [^\n]+\n[^\n]+", omnilmm.cache.redis.__doc__).group()
        client.execute_command(*line.replace("PASSWORD", "word").split())
        client.execute_command("ACL", "SETUSER", "default", "resetpass", "off")
        tier = make_tier(own_server.url.replace("unix://", "unix://omni:word@"))
        (state,) = await tier.claim([KEY], b"me", 5.0)
        assert state.holder == b"me"
        await tier.keep_lease(KEY, b"me", 5.0)
        assert await tier.put(KEY, embedding)
        await tier.end_lease(KEY, b"me", stored=True)
        assert await tier.find([KEY]) == [True]
        assert await vectors(tier, KEY) == embedding
        assert (await tier.look([KEY]))[0].holder is None
        news = await tier.subscribe()
        assert news is not None
        await news.aclose()


# -- F14: wrong bytes ---------------------------------------------------------------------------------


def wrong_values(embedding: Embedding) -> dict[str, bytes]:
    codec = Codec(SECRET)
    good = codec.encode(KEY, embedding).raw
    flipped = bytearray(good)
    flipped[1000] ^= 1
    return {
        "garbage": random.Random(7).randbytes(len(good)),
        "nothing": b"",
        "truncated": good[:-1],
        "one bit": bytes(flipped),
        "another picture or tenant": codec.encode(OTHER, embedding).raw,
        "another secret": Codec(b"somebody else's secret").encode(KEY, embedding).raw,
        "another kind": codec.encode_identity(KEY, IDENTITY),
        "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    }


@pytest.mark.parametrize("kind", sorted(wrong_values(Embedding("float32", (20, 20), bytes(1600)))))
async def test_f14_a_wrong_value_is_a_counted_miss_and_goes(
    kind: str, server: RedisServer, make_tier, recorder: Recorder
) -> None:
    embedding = Embedding("float32", (20, 20), bytes(1600))
    tier = make_tier(server.url)
    with admin(server) as client:
        client.set(NAME, wrong_values(embedding)[kind])
        assert await tier.get(KEY) is None
        assert recorder.outcomes("redis") == ["bad"]
        assert not client.exists(NAME)
    assert await tier.find([KEY]) == [False]
    assert not tier.is_down


async def test_f14_a_value_of_another_redis_type_is_a_counted_miss_and_goes(
    server: RedisServer, make_tier, recorder: Recorder
) -> None:
    tier = make_tier(server.url)
    with admin(server) as client:
        client.rpush(NAME, "a list")
        assert await tier.get(KEY) is None
        assert not client.exists(NAME)
    assert recorder.outcomes("redis") == ["bad"]


async def test_f14_a_wrong_identity_is_a_counted_miss_and_goes(
    server: RedisServer, make_tier, recorder: Recorder
) -> None:
    tier = make_tier(server.url)
    with admin(server) as client:
        client.set("omni:" + ALIAS, Codec(SECRET).encode_identity("pix:another", IDENTITY))
        assert await tier.get_identity(ALIAS) is None
        assert not client.exists("omni:" + ALIAS)
    assert recorder.outcomes("redis") == ["bad"]


@pytest.mark.parametrize("position", [0, 1, 3, 7, 9, 30, 2000, 400_000, 524_000, 524_359])
async def test_f14_a_bit_flipped_on_the_way_never_comes_through(
    position: int, proxy: FaultProxy, make_tier, clock: HandClock, embedding: Embedding
) -> None:
    tier = make_tier(proxy.url, timeout_s=HASTY_S)
    writer = make_tier("unix://" + proxy.upstream)
    assert await writer.put(KEY, embedding)
    proxy.flip_at = position  # of the first reply: the length line, the header, the numbers, the MAC, the line end
    answer, seconds = await timed(vectors(tier, KEY))
    assert answer in (None, embedding)  # a flip in the closing CRLF may go unnoticed, and harms nothing
    assert seconds < 2 * SOON_S
    proxy.flip_at = None
    proxy.cut()
    await works(tier, clock, embedding)


# -- F10, F11, F13, F17: no server, or no answer ------------------------------------------------------

EVERY_CALL: dict[str, Callable[[RedisTier], Awaitable]] = {
    "find": lambda tier: tier.find([KEY, OTHER]),
    "get": lambda tier: tier.get(KEY),
    "put": lambda tier: tier.put(KEY, Embedding("bfloat16", (64, 4096), bytes(64 * 4096 * 2))),
    "get_identity": lambda tier: tier.get_identity(ALIAS),
    "put_identity": lambda tier: tier.put_identity(ALIAS, IDENTITY),
    "claim": lambda tier: tier.claim([KEY], b"me", 1.0),
    "look": lambda tier: tier.look([KEY]),
    "keep_lease": lambda tier: tier.keep_lease(KEY, b"me", 1.0),
    "end_lease": lambda tier: tier.end_lease(KEY, b"me", stored=True),
    "drop_lease": lambda tier: tier.drop_lease(KEY, b"me"),
    "subscribe": lambda tier: tier.subscribe(),
}


async def is_a_miss_every_way(tier: RedisTier, clock: HandClock) -> None:
    """Each call answers "no" in time while the server fails, and at once while the breaker is open."""
    for name, call in EVERY_CALL.items():
        clock.now += 10.0  # so that a probe is due with each call
        answer, seconds = await timed(call(tier))
        assert not answer, name
        assert seconds < SOON_S, name
    assert (await tier.find([KEY])) is None  # the second failure in a row, where failures are quick
    assert tier.is_down
    started = time.monotonic()
    for _ in range(100):
        assert await tier.get(KEY) is None
    assert time.monotonic() - started < SOON_S


def kill(server: RedisServer) -> None:
    """SIGKILL, and wait until the process is gone; its sockets close before that, and `start` would find it alive."""
    os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while server.is_running:
        assert time.monotonic() < deadline, "the killed server still runs"
        time.sleep(0.001)


async def test_f10_killed_and_started_again(own_server: RedisServer, make_tier, clock, embedding: Embedding) -> None:
    tier = make_tier(own_server.url, timeout_s=HASTY_S)
    await works(tier, clock, embedding)
    kill(own_server)
    await is_a_miss_every_way(tier, clock)
    own_server.start()
    assert await tier.get(OTHER) is None
    assert tier.is_down  # the breaker keeps its term
    await works(tier, clock, embedding)


async def test_f10_killed_while_answering(own_server: RedisServer, make_tier, clock, embedding: Embedding) -> None:
    tier = make_tier(own_server.url, timeout_s=HASTY_S)
    await works(tier, clock, embedding)
    asking = [asyncio.create_task(vectors(tier, OTHER)) for _ in range(50)]
    await asyncio.sleep(0.001)
    os.kill(own_server.pid, signal.SIGKILL)
    assert all(answer in (None, embedding) for answer in await asyncio.gather(*asking))


async def test_f11_stopped_and_continued(own_server: RedisServer, make_tier, clock, embedding: Embedding) -> None:
    tier = make_tier(own_server.url, timeout_s=HASTY_S)
    await works(tier, clock, embedding)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        answer, seconds = await timed(vectors(tier, OTHER))
        assert answer is None
        assert seconds < SOON_S
        assert tier.is_down  # one timeout is enough
        await is_a_miss_every_way(tier, clock)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    await works(tier, clock, embedding)


async def test_f13_slow_or_throttled(proxy: FaultProxy, make_tier, clock, embedding: Embedding) -> None:
    tier = make_tier(proxy.url, timeout_s=HASTY_S)
    await works(tier, clock, embedding)
    proxy.delay_s = 0.2
    await is_a_miss_every_way(tier, clock)
    proxy.delay_s, proxy.bytes_per_s = 0.0, 10_000.0
    clock.now += 1.0
    answer, seconds = await timed(vectors(tier, OTHER))
    assert answer is None
    assert seconds < SOON_S
    proxy.bytes_per_s = None
    await works(tier, clock, embedding)
    assert proxy.num_open < 20


@pytest.mark.parametrize("fault", ["refuse", "black_hole"])
async def test_f13_cut_off_or_swallowed(fault: str, proxy: FaultProxy, make_tier, clock, embedding: Embedding) -> None:
    tier = make_tier(proxy.url, timeout_s=HASTY_S)
    await works(tier, clock, embedding)
    setattr(proxy, fault, True)
    proxy.cut()
    await is_a_miss_every_way(tier, clock)
    setattr(proxy, fault, False)
    proxy.cut()
    await works(tier, clock, embedding)


async def test_idle_connections_cut_by_the_other_side_cost_nothing(
    proxy: FaultProxy, make_tier, recorder: Recorder
) -> None:
    tier = make_tier(proxy.url)
    assert await tier.find([OTHER]) == [False]
    proxy.cut()
    await until(lambda: proxy.num_open == 0)
    assert await tier.find([OTHER]) == [False]
    assert recorder.outcomes("redis") == ["miss", "miss"]


async def test_f17_a_new_password_is_picked_up_from_its_file(
    own_server: RedisServer, make_tier, clock, embedding: Embedding, tmp_path: Path
) -> None:
    path = tmp_path / "password"
    path.write_text("first")
    tier = make_tier(own_server.url, timeout_s=HASTY_S, password_file=path)
    with admin(own_server) as client:
        client.config_set("requirepass", "first")
        await works(tier, clock, embedding)
        client.config_set("requirepass", "second")
        client.client_kill_filter(_type="normal", skipme=True)
        await is_a_miss_every_way(tier, clock)
        path.write_text("second")
        await works(tier, clock, embedding)
        client.config_set("requirepass", "third")
        client.client_kill_filter(_type="normal", skipme=True)
        path.unlink()  # between two states of a mounted secret
        await is_a_miss_every_way(tier, clock)
        path.write_text("third")
        await works(tier, clock, embedding)


async def test_f17_the_password_changes(own_server: RedisServer, make_tier, clock, embedding: Embedding) -> None:
    with admin(own_server) as client:
        client.config_set("requirepass", "word")
        right = make_tier(own_server.url.replace("unix://", "unix://:word@"), timeout_s=HASTY_S)
        wrong = make_tier(own_server.url.replace("unix://", "unix://:guess@"), timeout_s=HASTY_S)
        none = make_tier(own_server.url, timeout_s=HASTY_S)
        await works(right, clock, embedding)
        await is_a_miss_every_way(wrong, clock)
        await is_a_miss_every_way(none, clock)
        client.config_set("requirepass", "guess")
        await works(wrong, clock, embedding)


@asynccontextmanager
async def stranger(*answers: bytes):
    """Something on the port that is no Redis: it says `answers` in turn, one to each thing it hears."""
    said = iter(range(10**6))
    open_writers = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_writers.add(writer)
        try:
            while await reader.read(1 << 20):
                writer.write(answers[next(said) % len(answers)])
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in open_writers:
            writer.transport.abort()
        await server.wait_closed()


async def test_f17_a_web_server_on_the_port(make_tier, clock) -> None:
    async with stranger(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as url:
        await is_a_miss_every_way(make_tier(url, timeout_s=HASTY_S), clock)


async def test_f17_nonsense_in_the_protocol_is_never_an_exception(make_tier, clock, recorder: Recorder) -> None:
    nonsense = (
        b"$-1\r\n", b":1\r\n", b"*-1\r\n", b"*0\r\n", b"+OK\r\n", b"+\xff\xfe\r\n", b"-\xff\xfe\r\n", b"-MOVED x\r\n",
        b"-ASK 1 nowhere\r\n", b"-LOADING soon\r\n", b"-NOPERM no\r\n", b"-READONLY no\r\n", b"-OOM no\r\n",
        b"-EXECABORT no\r\n", b"-MASTERDOWN no\r\n", b"$99999999999999999999\r\n", b"$3\r\nabc\r\n",
        b"*1\r\n*1\r\n:1\r\n",
        b"*3\r\n$7\r\nmessage\r\n:1\r\n:2\r\n", b"%1\r\n+a\r\n+b\r\n", b">1\r\n+a\r\n", b"\r\n\r\n", b"\x00" * 100,
        b":99999999999999999999999\r\n", b"#t\r\n", b"_\r\n", b",inf\r\n", b"(123\r\n", b"=7\r\ntxt:abc\r\n",
    )  # fmt: skip
    for number, said in enumerate(nonsense):
        async with stranger(said, *random.Random(number).sample(nonsense, 3)) as url:
            tier = make_tier(url, timeout_s=0.01)
            for name, call in EVERY_CALL.items():
                clock.now += 10.0
                answer = await call(tier)
                assert not isinstance(answer, Encoded | PixelIdentity), name
                if name == "subscribe" and answer is not None:
                    await answer.next(0.01)
                    await answer.aclose()


# -- F12, F15, F16: it answers, but not with what we hoped ---------------------------------------------


async def test_f12_full_and_not_evicting(
    own_server: RedisServer, make_tier, recorder: Recorder, embedding: Embedding
) -> None:
    tier = make_tier(own_server.url)
    assert await tier.put(KEY, embedding)
    with admin(own_server) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
        for _ in range(5):
            assert not await tier.put(OTHER, embedding)
        assert recorder.outcomes("redis") == ["error"] * 5
        assert await tier.claim([OTHER], b"me", 1.0) == [None]
        assert await vectors(tier, KEY) == embedding  # what is there can still be read
        assert not tier.is_down
        client.config_set("maxmemory", "64mb")
        assert await tier.put(OTHER, embedding)


async def test_f15_flushed(server: RedisServer, make_tier, clock, embedding: Embedding) -> None:
    tier = make_tier(server.url)
    await works(tier, clock, embedding)
    with admin(server) as client:
        client.flushall()
    assert await tier.find([OTHER]) == [False]
    assert await tier.get(OTHER) is None
    await works(tier, clock, embedding)


async def test_f16_demoted_to_a_replica(own_server: RedisServer, make_tier, embedding: Embedding) -> None:
    tier = make_tier(own_server.url)
    assert await tier.put(KEY, embedding)
    with admin(own_server) as client:
        client.replicaof("127.0.0.1", "1")
        assert not await tier.put(OTHER, embedding)
        assert await tier.claim([OTHER], b"me", 1.0) == [None]
        assert await vectors(tier, KEY) == embedding
        client.replicaof("NO", "ONE")
        assert await tier.put(OTHER, embedding)


async def test_f17_outages_are_logged_once_and_name_no_secret(
    own_server: RedisServer, make_tier, clock, caplog: pytest.LogCaptureFixture
) -> None:
    tier = make_tier(own_server.url.replace("unix://", "unix://:guess@"))
    for _ in range(20):
        assert await tier.get(KEY) is None
    outages = [record for record in caplog.records if record.name.startswith("omnilmm")]
    assert len(outages) == 1
    assert "guess" not in caplog.text
    with admin(own_server) as client:
        client.config_set("requirepass", "guess")
        clock.now += 1.0
        assert await tier.find([KEY]) is None  # this question starts the probe
        await until(lambda: not tier.is_down)
        assert await tier.find([KEY]) == [False]
    assert "back" in caplog.records[-1].getMessage()
