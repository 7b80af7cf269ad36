"""The one function through which every exchange with Redis goes. It answers, or says None: it never raises.

redis-py gives connections, TLS, authentication and the wire format. What it does not give is a bound on the whole of
a call (its timeouts hold for each read, write and connect, and are followed by retries), so calls are made here on
its connections directly, under one time budget, behind a circuit breaker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from omnilmm.cache.address import MAX_CONNECTIONS, close_pool, make_pool
from omnilmm.cache.breaker import Breaker, Entry, Outcome

_log = logging.getLogger(__name__)

T = TypeVar("T")

_GRACE_TURNS: Final = 24  # connecting takes about 5, each 256 KiB of an answer 2


@asynccontextmanager
async def budget(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, but fair on a busy event loop: `seconds`, and then a few more turns of the loop.

    An exchange takes several turns. Where hundreds of requests share the loop a turn can last longer than the server
    takes to answer, and a plain timeout would give up on an answer that lies in the socket: every question would then
    fail just when the cache is needed most. On an idle loop the extra turns take well under a millisecond.

    Raises:
        TimeoutError: the time is up.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.Handle

    async with asyncio.timeout(None) as limit:

        def expire(turns: int) -> None:
            nonlocal timer
            if turns:
                timer = loop.call_soon(expire, turns - 1)
            else:
                limit.reschedule(loop.time())

        timer = loop.call_later(seconds, expire, _GRACE_TURNS)
        try:
            yield
        finally:
            timer.cancel()


async def converse(connection: AbstractConnection, *commands: tuple[Any, ...]) -> list[Any]:
    """Send `commands` in one write and read their replies; a command the server refuses gives a ResponseError item."""
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
    replies: list[Any] = []
    for _ in commands:
        try:
            replies.append(await connection.read_response())
        except ResponseError as refusal:
            replies.append(refusal)
    return replies


class RedisLink:
    """Connections to one server.

    A server that is gone or hangs costs at most `timeout_s` whoever finds out; while the breaker is open a call costs
    nothing, and probes run in the background. When more calls come at once than there are connections, they queue for
    up to two more `timeout_s`, as long as the server answers the others: a queue for a server that hangs leaves with
    the first who found out.

    Args:
        url: in one of the forms of cache/address.
        timeout_s: for one whole exchange: finding the server, connecting, authenticating, writing, reading.
        breaker: shared by all calls of this link.
        password_file: where the server's password stands, if not in the URL; read anew at every connection.

    Raises:
        ConfigError: the URL cannot be used, or names another machine without a password; the file holds none.
    """

    def __init__(self, url: str, *, timeout_s: float, breaker: Breaker, password_file: Path | None = None) -> None:
        self._timeout_s = timeout_s
        self._breaker = breaker
        self._pool = make_pool(url, timeout_s=timeout_s, password_file=password_file)
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._num_open = 0
        self._num_aside = 0
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_down(self) -> bool:
        """Whether the server counts as gone."""
        return self._breaker.is_open

    async def run_aside(self, exchange: Callable[[AbstractConnection], Awaitable[T]]) -> T | None:
        """As `run`, for work nobody waits for: it may be under way when all else is at rest."""
        self._num_aside += 1
        try:
            return await self.run(exchange)
        finally:
            self._num_aside -= 1

    async def run(self, exchange: Callable[[AbstractConnection], Awaitable[T]]) -> T | None:
        """What `exchange` returns, or None when there was no connection, no time or no sense in the answer."""
        if self.is_down:
            self._probe_if_due()
            return None
        try:
            async with budget(2 * self._timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            return None  # too many of us at once, which says nothing about the server
        try:
            if self._breaker.is_open:  # it opened while we queued
                return None
            return await self._attempt(exchange, Entry.CALL)
        finally:
            self._slots.release()

    def _probe_if_due(self) -> None:
        """Find out in the background whether the server is back: nobody's request waits for a server that is gone.

        The probe is a PING only: half a megabyte written to a hung server would linger in our memory.
        """
        if self._breaker.try_enter() is Entry.PROBE:

            async def ping(connection: AbstractConnection) -> None:
                await converse(connection, ("PING",))

            self._probe = asyncio.get_running_loop().create_task(self._attempt(ping, Entry.PROBE), name="redis probe")

    async def _attempt(self, exchange: Callable[[AbstractConnection], Awaitable[T]], entry: Entry) -> T | None:
        outcome, answer, fault = Outcome.CANCELLED, None, ""
        try:
            async with budget(self._timeout_s):
                answer = await self._converse(exchange)
            outcome = Outcome.ANSWERED
        except (TimeoutError, RedisTimeoutError):
            outcome, fault = Outcome.TIMED_OUT, "no answer in time"
        except (RedisError, OSError) as error:
            outcome, fault = Outcome.FAILED, type(error).__name__
        except Exception as error:
            # Whatever a garbled reply makes the client library do, the cache stays optional.
            outcome, fault = Outcome.FAILED, type(error).__name__
            _log.exception("Redis: unexpected failure of the client, treated as a miss")
        finally:
            self._report(entry, outcome, fault)
        return answer

    def _report(self, entry: Entry, outcome: Outcome, fault: str) -> None:
        was_down = self._breaker.is_open
        self._breaker.leave(entry, outcome)
        if self._breaker.is_open and not was_down:
            _log.warning("Redis is out (%s): every question to it is a miss until it is back", fault)
        elif was_down and not self._breaker.is_open:
            _log.warning("Redis is back")

    async def _converse(self, exchange: Callable[[AbstractConnection], Awaitable[T]]) -> T:
        connection = await self._pool.get_connection()
        self._num_open += 1
        try:
            return await exchange(connection)
        except BaseException:
            # A half-read answer must never meet the next caller, nor a WATCH its transaction.
            await connection.disconnect(nowait=True)
            raise
        finally:
            self._num_open -= 1
            await self._pool.release(connection)

    async def subscribe(self, channel: str) -> Subscription | None:
        """Listen to `channel` on a connection of its own, or None when that is not to be had."""
        if self._breaker.is_open:
            return None
        connection = self._pool.make_connection()
        try:
            async with budget(self._timeout_s):
                await connection.connect()
                (reply,) = await converse(connection, ("SUBSCRIBE", channel))
            if isinstance(reply, list) and reply[:1] == [b"subscribe"]:
                return Subscription(connection)
        except Exception as error:
            # Polling does the same work more slowly, and the polls tell the breaker.
            _log.info("Redis: no subscription (%s)", type(error).__name__)
        except asyncio.CancelledError:
            await connection.disconnect(nowait=True)
            raise
        await connection.disconnect(nowait=True)
        return None

    def check_integrity(self) -> None:
        """Assert that no exchange holds a connection, but for a probe and what runs aside. Call when idle."""
        num_probing = 1 if self._probe is not None and not self._probe.done() else 0
        assert self._num_open <= num_probing + self._num_aside, "redis link: a connection was not handed back"

    async def aclose(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait({self._probe})
        await close_pool(self._pool)


class Subscription:
    """Messages of one channel. Close it when done."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self.is_alive = True

    async def next(self, timeout_s: float) -> bytes | None:
        """The next message, or None when none came in time or the connection broke (see `is_alive`)."""
        try:
            reply = await self._connection.read_response(timeout=max(timeout_s, 0.0))
        except Exception as error:  # whatever a garbled message makes the client library do, polling goes on
            _log.info("Redis: subscription lost (%s)", type(error).__name__)
            await self.aclose()
            return None
        if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"message" and isinstance(reply[2], bytes):
            return reply[2]
        return None

    async def aclose(self) -> None:
        self.is_alive = False
        await self._connection.disconnect(nowait=True)
