"""The tier all processes share: a Redis or Valkey server, where any trouble at all is a miss.

Names are "omni:" + key for values and "omni:lease:" + key for leases; news travels on the channel "omni:wake".
Values are sealed (cache/codec), so what the server hands back is either what one of us stored under that very name or
nothing. No scripting is used here. The whole of what an ACL user needs for the cache (limits of tenants need more, see
deployments/limits.py):

    ACL SETUSER omni on >PASSWORD ~omni:* &omni:* -@all +ping +select +touch +get +set +del
        +watch +unwatch +multi +exec +publish +subscribe +time +zadd +zrangebyscore +zremrangebyscore
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from omnilmm.cache.breaker import Breaker
from omnilmm.cache.codec import Codec
from omnilmm.cache.link import RedisLink, Subscription, converse
from omnilmm.messages import Embedding, Encoded, PixelIdentity
from omnilmm.observe import CacheAsked, Observer
from omnilmm.ports import Clock

_log = logging.getLogger(__name__)

V = TypeVar("V")

TIER: Final = "redis"
_NAMESPACE: Final = "omni:"
_WAKE: Final = "omni:wake"
_ERASED: Final = "omni:erased"
ERASED_MS: Final = 3_600_000
"""How long it is remembered what was erased."""
_OVERLAP_MS: Final = 2_000  # what is erased in the same moment as the list is read is read again


@dataclass(frozen=True, slots=True)
class KeyState:
    """What the server says about a key: is there a value, and who holds its lease (None: nobody).

    `is_new`: the lease was taken by the very exchange that brought this answer.
    """

    stored: bool
    holder: bytes | None
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Wake:
    """News from another process: `key` is no longer being encoded there; `stored` if its value can be found."""

    key: str
    stored: bool


@dataclass(frozen=True, slots=True)
class Erased:
    """Keys that were erased lately, or the lone None: more was erased than the server remembers."""

    names: tuple[str | None, ...]
    now_ms: int


class RedisTier:
    """Sealed values and leases on one server.

    Every method answers within about `timeout_s`, at once while the breaker is open, and never raises. Outcomes go to
    the observer as CacheAsked: "hit", "miss", "bad" (not sealed by us for this name; it is deleted), "error" (the
    server is gone, slow or refuses, on reads and on writes), "refused" (the codec's lossy encoding does not fit these
    vectors; they are kept exactly).

    Args:
        url: in one of the forms of cache/address.
        codec: seals the values.
        timeout_s: for one whole exchange.
        ttl_s: life of a value from its last write.
        breaker_failures: consecutive failures that open the breaker; one timeout does too.
        breaker_open_s: time until a probe may close it.
        password_file: where the server's password stands, if not in the URL.

    Raises:
        ConfigError: the URL or the file cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        codec: Codec,
        observer: Observer,
        clock: Clock,
        timeout_s: float = 0.05,
        ttl_s: float = 7 * 24 * 3600.0,
        breaker_failures: int = 2,
        breaker_open_s: float = 1.0,
        password_file: Path | None = None,
    ) -> None:
        breaker = Breaker(clock, failures=breaker_failures, open_s=breaker_open_s)
        self._link = RedisLink(url, timeout_s=timeout_s, breaker=breaker, password_file=password_file)
        self._codec = codec
        self._observer = observer
        self._is_refusal_logged = False
        self._ttl_ms = _milliseconds(ttl_s)

    @property
    def is_down(self) -> bool:
        """Whether the server counts as gone, so that nobody should wait for news from it."""
        return self._link.is_down

    # -- values ---------------------------------------------------------------------------------------

    async def find(self, keys: Sequence[str]) -> list[bool] | None:
        """Which of `keys` have a value, in one round trip; None when the server does not say."""
        # TOUCH counts as a use, which EXISTS does not: pictures asked for again stay when memory runs out.
        replies = await self._ask(*(("TOUCH", _value_name(key)) for key in keys))
        if replies is None:
            for _ in keys:
                self._tell("error")
            return None
        for reply in replies:
            self._tell("error" if isinstance(reply, ResponseError) else "hit" if reply == 1 else "miss")
        return [reply == 1 for reply in replies]

    async def get(self, key: str) -> Encoded | None:
        """The vectors, and the seconds it took whoever made them."""
        return await self._get(key, self._codec.decode)

    async def put(self, key: str, embedding: Embedding, *, seconds: float = 0.0) -> bool:
        """True if other processes can now find it."""
        sealed = self._codec.encode(key, embedding, seconds=seconds)
        if sealed.encoding is not self._codec.encoding:
            self._refuse()
        return await self._put(key, sealed.raw)

    async def get_identity(self, alias: str) -> PixelIdentity | None:
        return await self._get(alias, self._codec.decode_identity)

    async def put_identity(self, alias: str, identity: PixelIdentity) -> bool:
        """True if other processes can now find it."""
        return await self._put(alias, self._codec.encode_identity(alias, identity))

    async def _get(self, key: str, decode: Callable[[str, bytes], V | None]) -> V | None:
        replies = await self._ask(("GET", _value_name(key)))
        raw = replies[0] if replies else None
        if replies is None or (isinstance(raw, ResponseError) and not str(raw).startswith("WRONGTYPE")):
            self._tell("error")
            return None
        if raw is None:
            self._tell("miss")
            return None
        value = decode(key, raw) if isinstance(raw, bytes) else None
        if value is None:
            self._tell("bad")
            await self._ask(("DEL", _value_name(key)))
            return None
        self._tell("hit", len(raw))
        return value

    async def _put(self, key: str, raw: bytes) -> bool:
        replies = await self._ask(("SET", _value_name(key), raw, "PX", self._ttl_ms))
        stored = replies == [b"OK"]
        if not stored:
            self._tell("error", len(raw))
        return stored

    # -- erasure --------------------------------------------------------------------------------------

    async def erase(self, keys: Sequence[str]) -> bool:
        """Delete the values, and note for every process's memory that they are gone. False if it could not be done."""
        if not keys:
            return True
        names = [_value_name(key) for key in keys]

        async def exchange(connection: AbstractConnection) -> bool:
            now_ms = _read_time((await converse(connection, ("TIME",)))[0])
            if now_ms is None:
                return False
            scored = [word for key in keys for word in (now_ms, key)]
            forget = ("ZREMRANGEBYSCORE", _ERASED, "-inf", now_ms - ERASED_MS)
            *_, done = await converse(
                connection, ("MULTI",), ("DEL", *names), ("ZADD", _ERASED, *scored), forget, ("EXEC",)
            )
            return isinstance(done, list) and not any(isinstance(reply, ResponseError) for reply in done)

        return await self._link.run(exchange) or False

    async def erased_since(self, seen_ms: int | None) -> Erased | None:
        """What was erased since `seen_ms` (an earlier answer's `now_ms`, None at first); None without an answer."""
        since = "-inf" if seen_ms is None else str(seen_ms - _OVERLAP_MS)
        commands = (("TIME",), ("ZRANGEBYSCORE", _ERASED, since, "+inf"))
        replies = await self._link.run_aside(lambda connection: converse(connection, *commands))
        if replies is None or not isinstance(replies[1], list):
            return None
        now_ms = _read_time(replies[0])
        if now_ms is None:
            return None
        if seen_ms is not None and now_ms - seen_ms > ERASED_MS:
            return Erased((None,), now_ms)
        return Erased(tuple(name.decode("ascii", "replace") for name in replies[1]), now_ms)

    # -- leases ---------------------------------------------------------------------------------------

    async def claim(self, keys: Sequence[str], token: bytes, lease_s: float) -> list[KeyState | None] | None:
        """Take the lease of every key that nobody holds, and say how each then stands, in one round trip.

        A key is None where the server refused (full, read-only); the whole answer is None when it did not answer.
        The value is looked for *after* the lease was tried: a leader stores first and lets go then, so whoever gets
        the lease next is sure to see the value.
        """
        commands: list[tuple[Any, ...]] = []
        for key in keys:
            commands.append(("SET", _lease_name(key), token, "NX", "PX", _milliseconds(lease_s)))
            commands += _look(key)
        replies = await self._ask(*commands)
        if replies is None:
            return None
        taken, holders, stored = replies[::3], replies[1::3], replies[2::3]
        return [
            None if isinstance(reply, ResponseError) else _state(holder, value, is_new=reply == b"OK")
            for reply, holder, value in zip(taken, holders, stored, strict=True)
        ]

    async def look(self, keys: Sequence[str]) -> list[KeyState] | None:
        """How `keys` stand, in one round trip; None when the server does not say."""
        replies = await self._ask(*(command for key in keys for command in _look(key)))
        if replies is None:
            return None
        return [_state(holder, value) for holder, value in zip(replies[::2], replies[1::2], strict=True)]

    async def keep_lease(self, key: str, token: bytes, lease_s: float) -> None:
        """Prolong our lease, or take it anew if the server lost it."""
        renew = ("SET", _lease_name(key), token, "PX", _milliseconds(lease_s))
        await self._link.run(partial(_if_held, name=_lease_name(key), by=(token, None), commands=(renew,)))

    async def drop_lease(self, key: str, token: bytes) -> None:
        """Let go of a lease nobody can be waiting for."""
        drop = ("DEL", _lease_name(key))
        await self._link.run(partial(_if_held, name=_lease_name(key), by=(token,), commands=(drop,)))

    async def end_lease(self, key: str, token: bytes, *, stored: bool) -> None:
        """Let go of our lease, unless it is another's by now, and wake whoever waits for `key`."""
        drop = ("DEL", _lease_name(key))
        news = ("PUBLISH", _WAKE, (b"1" if stored else b"0") + key.encode())

        async def end(connection: AbstractConnection) -> None:
            if not await _if_held(connection, name=_lease_name(key), by=(token,), commands=(drop, news)):
                await converse(connection, news)

        await self._link.run(end)

    async def subscribe(self) -> Subscription | None:
        """Listen for the news `end_lease` sends; read it with `read_wake`."""
        return await self._link.subscribe(_WAKE)

    # -- the server -----------------------------------------------------------------------------------

    async def _ask(self, *commands: tuple[Any, ...]) -> list[Any] | None:
        return await self._link.run(lambda connection: converse(connection, *commands))

    def _refuse(self) -> None:
        self._tell("refused")
        if not self._is_refusal_logged:
            self._is_refusal_logged = True
            _log.warning(
                "the %s encoding does not fit this encoder's vectors: they are kept exact", self._codec.encoding
            )

    def _tell(self, outcome: str, num_bytes: int = 0) -> None:
        self._observer.emit(CacheAsked(TIER, outcome, num_bytes))

    def check_integrity(self) -> None:
        """Assert that nothing is under way. Call when idle."""
        self._link.check_integrity()

    async def aclose(self) -> None:
        await self._link.aclose()


def read_wake(message: bytes) -> Wake | None:
    """What `end_lease` published, or None for anything else."""
    if message[:1] not in (b"0", b"1"):
        return None
    return Wake(message[1:].decode("ascii", "replace"), message[:1] == b"1")


async def _if_held(
    connection: AbstractConnection,
    *,
    name: str,
    by: tuple[bytes | None, ...],
    commands: Sequence[tuple[Any, ...]],
) -> bool:
    """Run `commands` only if the value of `name` is one of `by` and stays so: optimistic locking, no scripting.

    An exception on the way closes the connection (RedisLink), and with it the watch.
    """
    _, holder = await converse(connection, ("WATCH", name), ("GET", name))
    if holder not in by:
        await converse(connection, ("UNWATCH",))
        return False
    *_, done = await converse(connection, ("MULTI",), *commands, ("EXEC",))
    return isinstance(done, list)


def _look(key: str) -> list[tuple[str, str]]:
    return [("GET", _lease_name(key)), ("TOUCH", _value_name(key))]


def _state(holder: object, stored: object, *, is_new: bool = False) -> KeyState:
    return KeyState(stored == 1, holder if isinstance(holder, bytes) else None, is_new)


def _value_name(key: str) -> str:
    return _NAMESPACE + key


def _lease_name(key: str) -> str:
    return f"{_NAMESPACE}lease:{key}"


def _read_time(reply: object) -> int | None:
    """Milliseconds from what TIME answers."""
    return int(reply[0]) * 1000 + int(reply[1]) // 1000 if isinstance(reply, list) and len(reply) == 2 else None


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
