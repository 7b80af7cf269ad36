from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from cache_fakes import HASTY_S, PATIENT_S, HandClock
from fault_proxy import FaultProxy

from deployments.redis_server import RedisServer
from omnilmm.cache.address import MAX_CONNECTIONS
from omnilmm.cache.breaker import Breaker
from omnilmm.cache.link import RedisLink, budget, converse


@pytest.fixture
async def make_link(clock: HandClock) -> AsyncIterator:
    links: list[RedisLink] = []

    def make(url: str, timeout_s: float = PATIENT_S) -> RedisLink:
        links.append(RedisLink(url, timeout_s=timeout_s, breaker=Breaker(clock, failures=2, open_s=1.0)))
        return links[-1]

    yield make
    for link in links:
        link.check_integrity()
        await link.aclose()


async def ask(link: RedisLink, *commands: tuple) -> list | None:
    return await link.run(lambda connection: converse(connection, *commands))


async def test_a_budget_ends() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with budget(0.02):
            await asyncio.sleep(30)
    assert time.monotonic() - started < 10


async def test_a_busy_loop_is_not_the_servers_fault(server: RedisServer, make_link) -> None:
    link = make_link(server.url, HASTY_S)
    assert await ask(link, ("PING",)) == [b"PONG"]
    question = asyncio.create_task(ask(link, ("ECHO", "still there")))
    await asyncio.sleep(0)  # it is sent
    time.sleep(0.2)  # the loop is held up for four budgets  # noqa: ASYNC251
    assert await question == [b"still there"]
    assert not link.is_down


async def test_nor_are_many_neighbours_on_it(server: RedisServer, proxy: FaultProxy, make_link) -> None:
    """Each turn of the loop lasts 30 ms: two of them are more than the budget, and a long answer takes several."""
    echo = bytes(1 << 19)
    stop = asyncio.Event()

    async def neighbour() -> None:
        while not stop.is_set():
            time.sleep(0.005)  # noqa: ASYNC251
            await asyncio.sleep(0)

    neighbours = [asyncio.create_task(neighbour()) for _ in range(6)]
    try:
        assert await ask(make_link(server.url, HASTY_S), ("ECHO", echo)) == [echo]
        proxy.black_hole = True
        started = time.monotonic()
        assert await ask(make_link(proxy.url, HASTY_S), ("PING",)) is None
        assert time.monotonic() - started < 4.0
    finally:
        stop.set()
        await asyncio.gather(*neighbours)


async def test_refused_commands_are_answers_not_outages(server: RedisServer, make_link) -> None:
    link = make_link(server.url)
    for _ in range(5):
        replies = await ask(link, ("NOSUCHCOMMAND",), ("ECHO", "on"))
        assert isinstance(replies[0], Exception)
        assert replies[1] == b"on"
    assert not link.is_down


async def test_an_exchange_given_up_half_way_does_not_answer_the_next(proxy: FaultProxy, make_link) -> None:
    link = make_link(proxy.url)
    assert await ask(link, ("PING",)) == [b"PONG"]
    proxy.delay_s = 0.1
    first = asyncio.create_task(ask(link, ("ECHO", "first")))
    await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.wait({first})
    assert first.cancelled()
    proxy.delay_s = 0.0
    assert await ask(link, ("ECHO", "second")) == [b"second"]
    assert not link.is_down


async def test_a_failed_transaction_leaves_no_watch_behind(server: RedisServer, make_link) -> None:
    link = make_link(server.url)

    async def watch_and_fail(connection) -> None:
        await converse(connection, ("WATCH", "omni:w"))
        raise ConnectionResetError

    assert await link.run(watch_and_fail) is None
    assert await ask(link, ("SET", "omni:w", "1")) == [b"OK"]
    replies = await ask(link, ("MULTI",), ("GET", "omni:w"), ("EXEC",))
    assert replies[-1] == [b"1"]


async def test_a_probe_is_small_and_nobody_waits_for_it(proxy: FaultProxy, make_link, clock: HandClock) -> None:
    """What is written to a hung server stays in our memory and its socket until it wakes."""
    link = make_link(proxy.url, HASTY_S)
    proxy.black_hole = True
    assert await ask(link, ("PING",)) is None
    before = proxy.num_bytes_asked
    for _ in range(3):
        clock.now += 1.0
        started = time.monotonic()
        assert await ask(link, ("SET", "omni:big", bytes(1 << 19))) is None
        assert time.monotonic() - started < HASTY_S / 2
        await asyncio.wait({link._probe})
    assert 0 < proxy.num_bytes_asked - before < 1000


async def test_the_number_of_connections_is_bounded(proxy: FaultProxy, make_link) -> None:
    link = make_link(proxy.url)
    proxy.delay_s = 0.01
    answers = await asyncio.gather(*(ask(link, ("ECHO", str(number))) for number in range(100)))
    assert answers == [[str(number).encode()] for number in range(100)]
    assert proxy.num_accepted <= MAX_CONNECTIONS


async def test_callers_queueing_for_a_hung_server_leave_with_the_first(proxy: FaultProxy, make_link) -> None:
    link = make_link(proxy.url, HASTY_S)
    proxy.black_hole = True
    started = time.monotonic()
    answers = await asyncio.gather(*(ask(link, ("PING",)) for _ in range(500)))
    assert answers == [None] * 500
    assert time.monotonic() - started < 0.5
    assert proxy.num_accepted <= MAX_CONNECTIONS
    assert link.is_down


async def test_the_url_cannot_loosen_the_bounds(proxy: FaultProxy, make_link) -> None:
    loose = "socket_timeout=60&socket_connect_timeout=60&retry_on_timeout=yes&max_connections=999"
    link = make_link(f"{proxy.url}?{loose}", HASTY_S)
    proxy.black_hole = True
    started = time.monotonic()
    assert await ask(link, ("PING",)) is None
    assert time.monotonic() - started < 0.5


async def test_a_subscription_hears_and_ends(server: RedisServer, make_link) -> None:
    link = make_link(server.url)
    news = await link.subscribe("omni:wake")
    assert await news.next(0.0) is None
    assert await ask(link, ("PUBLISH", "omni:wake", b"\x00news")) == [1]
    assert await news.next(5.0) == b"\x00news"
    assert news.is_alive
    await news.aclose()
    assert not news.is_alive


async def test_a_broken_subscription_says_so(proxy: FaultProxy, make_link) -> None:
    link = make_link(proxy.url)
    news = await link.subscribe("omni:wake")
    proxy.cut()
    assert await news.next(5.0) is None
    assert not news.is_alive


async def test_no_subscription_from_a_server_that_is_not_there(proxy: FaultProxy, make_link) -> None:
    link = make_link(proxy.url, HASTY_S)
    proxy.refuse = True
    assert await link.subscribe("omni:wake") is None
    proxy.refuse, proxy.black_hole = False, True
    assert await link.subscribe("omni:wake") is None
