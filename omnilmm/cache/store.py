"""The embedding store: this process's memory over the shared Redis, with one encode per picture.

Redis is optional at every moment. Gone, hung, full or lying, it makes misses; single flight then still holds within
each process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from omnilmm.cache.codec import Codec
from omnilmm.cache.encoding import Encoding
from omnilmm.cache.erasure import ErasureWatch
from omnilmm.cache.flight import Flights
from omnilmm.cache.memory import MemoryTier
from omnilmm.cache.question import Questions
from omnilmm.cache.redis import RedisTier
from omnilmm.config import CacheConfig
from omnilmm.messages import Embedding, PixelIdentity
from omnilmm.observe import CacheAsked, Observer
from omnilmm.ports import Clock, Hit, Lookup

TIER: Final = "memory"
_IDENTITY_BYTES: Final = 128
_IDENTITY_SECONDS: Final = 0.02  # about what it takes to decode a photograph, which remembering it spares

Held = Embedding | PixelIdentity


class TieredStore:
    """Implements ports.EmbeddingStore. Give it one event loop for its life; it may be made before that loop runs.

    Args:
        memory: the tier of this process; 0 bytes where a process never reads what it wrote (a vision replica).
        redis: the tier all processes share, or None.
        config: `lease_s` is read here.
        observer: is told of every key asked for.
        sole: this object is the product's only store, handed to encoder and decoder alike (the library in one
            process). Only then does a value in memory alone count as found by others.
    """

    def __init__(
        self,
        memory: MemoryTier[Held],
        redis: RedisTier | None,
        config: CacheConfig,
        observer: Observer,
        *,
        sole: bool = False,
    ) -> None:
        self._memory = memory
        self._redis = redis
        self._observer = observer
        self._sole = sole
        self._flights = Flights(redis, config.lease_s)
        self._questions = None if redis is None else Questions(redis, self._flights, config.lease_s)
        self._erasures = None if redis is None or memory.max_bytes <= 0 else ErasureWatch(redis, self._drop)

    @property
    def is_shared(self) -> bool:
        """Whether a decoder can be expected to find what is put: false without Redis, and while it is down."""
        return self._sole or (self._redis is not None and not self._redis.is_down)

    async def lookup(self, keys: Sequence[str]) -> Mapping[str, Lookup]:
        """Hit, lease or flight for every distinct key: one round trip to Redis if all are there, two if not.

        A Hit means that `get` of this store finds the vectors. Another process finds them too unless they are in this
        memory alone, which happens when Redis was out at the time they were made. Every lease must be ended.
        """
        distinct = dict.fromkeys(keys)
        found: dict[str, Lookup] = {}
        asked: list[str] = []
        for key in distinct:
            if self._memory.get(key) is not None:
                self._tell("hit")
                found[key] = Hit()
                continue
            self._tell("miss")
            flight = self._flights.try_join(key)
            if flight is None:
                asked.append(key)
            else:
                found[key] = flight
        if self._questions is None:
            found |= {key: self._flights.take(key, None) for key in asked}
        elif asked:
            found |= await self._questions.ask(asked)
        return {key: found[key] for key in distinct}

    async def get(self, key: str) -> Embedding | None:
        """The vectors, from the nearest tier that has them. What Redis gave is kept in memory."""
        held = self._memory.get(key)
        if isinstance(held, Embedding):
            self._tell("hit", len(held.data))
            return held
        self._tell("miss")
        if self._redis is None:
            return None
        found = await self._redis.get(key)
        if found is None or found.embedding is None:
            return None
        self._remember(key, found.embedding, len(found.embedding.data), found.seconds)
        return found.embedding

    async def put(self, key: str, embedding: Embedding, *, seconds: float = 0.0) -> bool:
        """Keep the vectors in every tier. True if the decoder's store can now find them: Redis took them, or this
        store is the sole one and has room.

        Args:
            key: their name.
            embedding: the vectors.
            seconds: what it took to make them (Encoded.seconds), 0 if nobody knows. The more per byte, the longer
                memory keeps them.

        Raises:
            ValueError: the record's data does not match its dtype and shape.
        """
        kept = self._remember(key, embedding, len(embedding.data), seconds)
        stored = self._redis is not None and await self._redis.put(key, embedding, seconds=seconds)
        return stored or (self._sole and kept)

    async def get_identity(self, alias: str) -> PixelIdentity | None:
        """What a file known under `alias` shows."""
        held = self._memory.get(alias)
        if isinstance(held, PixelIdentity):
            self._tell("hit", _IDENTITY_BYTES)
            return held
        self._tell("miss")
        if self._redis is None:
            return None
        identity = await self._redis.get_identity(alias)
        if identity is not None:
            self._remember(alias, identity, _IDENTITY_BYTES, _IDENTITY_SECONDS)
        return identity

    async def put_identity(self, alias: str, identity: PixelIdentity) -> None:
        """Remember what a file shows.

        Raises:
            ValueError: the digest is not 32 bytes.
        """
        self._remember(alias, identity, _IDENTITY_BYTES, _IDENTITY_SECONDS)
        if self._redis is not None:
            await self._redis.put_identity(alias, identity)

    async def erase(self, names: Sequence[str]) -> bool:
        """Forget keys and aliases in every tier: here and in Redis at once, in other processes within seconds.

        False if Redis could not be reached: they may then still be found. Without Redis only this process can forget.
        Whoever is encoding such a picture at this moment may store it again.
        """
        for name in names:
            self._drop(name)
        return self._redis is None or await self._redis.erase(names)

    def _remember(self, name: str, value: Held, num_bytes: int, seconds: float) -> bool:
        if self._erasures is not None:
            self._erasures.begin()
        return self._memory.put(name, value, num_bytes, seconds=seconds)

    def _drop(self, name: str | None) -> None:
        if name is None:
            self._memory.take_all()
        else:
            self._memory.take(name)

    def _tell(self, outcome: str, num_bytes: int = 0) -> None:
        self._observer.emit(CacheAsked(TIER, outcome, num_bytes))

    def check_integrity(self) -> None:
        """Assert that every tier's books are right and that no lease, wait or exchange is open. Call when idle."""
        self._memory.check_integrity()
        self._flights.check_integrity()
        if self._questions is not None:
            self._questions.check_integrity()
        if self._redis is not None:
            self._redis.check_integrity()

    async def aclose(self) -> None:
        """Abandon what is under way, end every task, close every connection."""
        if self._questions is not None:
            await self._questions.aclose()
        await self._flights.aclose()
        if self._erasures is not None:
            await self._erasures.aclose()
        if self._redis is not None:
            await self._redis.aclose()


def open_store(
    config: CacheConfig,
    *,
    secret: bytes,
    observer: Observer,
    clock: Clock,
    sole: bool = False,
    encoding: Encoding = Encoding.EXACT,
    password_file: Path | None = None,
) -> TieredStore:
    """The store a configuration describes.

    Args:
        config: sizes, times and where Redis is.
        secret: the one given to KeyRing.
        observer: is told of every key asked for.
        clock: monotonic seconds.
        sole: see TieredStore.
        encoding: of the numbers in Redis.
        password_file: where the password of Redis stands, if not in its URL.

    Raises:
        ConfigError: the secret is too short, `redis_url` cannot be used, or the file holds no password.
    """
    redis = None
    if config.redis_url is not None:
        redis = RedisTier(
            config.redis_url,
            codec=Codec(secret, encoding),
            observer=observer,
            clock=clock,
            timeout_s=config.timeout_s,
            ttl_s=config.ttl_s,
            breaker_failures=config.breaker_failures,
            breaker_open_s=config.breaker_open_s,
            password_file=password_file,
        )
    return TieredStore(MemoryTier(config.memory_bytes), redis, config, observer, sole=sole)
