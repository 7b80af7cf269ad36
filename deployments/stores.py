"""The embedding store of a replica, and the embedded Redis server of the one-machine default.

The embedded server is a child of one Ray actor, which any replica creates or finds by name. It ends with the
cluster: the child is told by the kernel when the actor dies.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from deployments.redis_server import RedisServer
from deployments.settings import Cache, cache_secret
from omnilmm.cache.encoding import Encoding
from omnilmm.cache.gate import is_fit, rehearsal_pictures
from omnilmm.cache.key import KeyRing
from omnilmm.cache.redis import TIER as REDIS_TIER
from omnilmm.cache.store import TieredStore
from omnilmm.cache.store import open_store as open_tiers
from omnilmm.errors import ConfigError, OmniError
from omnilmm.messages import Embedding, PreparedImage
from omnilmm.observe import CacheAsked, Observer
from omnilmm.pipeline import SystemClock

NAMESPACE = "omnilmm"
ACTOR_NAME = "embedded-redis"

Encode = Callable[[Sequence[PreparedImage]], list[Embedding | OmniError]]

logger = logging.getLogger("ray.serve")


class EmbeddedRedis:
    """Keeps one Redis server running on this machine and tells who asks where it is.

    The secret that cache keys and MACs are made with is drawn here, so it lives and dies with the entries.
    """

    def __init__(self, max_bytes: int) -> None:
        self._server = RedisServer(max_memory_bytes=max_bytes)
        self._secret = secrets.token_bytes(32)
        self._watch: asyncio.Task[None] | None = None

    async def address(self) -> tuple[str, bytes]:
        """The server's URL and the secret. Starts the server at the first call."""
        if self._watch is None:
            self._server.start()
            self._watch = asyncio.get_running_loop().create_task(self._keep_alive())
        return self._server.url, self._secret

    async def pid(self) -> int:
        return self._server.pid

    async def stop(self) -> None:
        """End the server and remove its socket."""
        if self._watch is not None:
            self._watch.cancel()
        self._server.stop()

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if not self._server.is_running:
                logger.warning("the embedded Redis server died and is started again; it begins empty")
                self._server.start()


async def open_store(cache: Cache, observer: Observer, *, memory_bytes: int | None = None) -> TieredStore:
    """The store of this process as the settings say, with a memory of its own size if given. The caller closes it."""
    url, secret = await locate(cache)
    config = cache.config(url)
    if memory_bytes is not None:
        config = config.resolve(memory_bytes=memory_bytes)
    return open_tiers(
        config,
        secret=secret,
        observer=observer,
        clock=SystemClock(),
        encoding=Encoding(cache.encoding),
        password_file=password_file(cache),
    )


async def open_encoder_store(cache: Cache, observer: Observer, encode: Encode, side: int) -> TieredStore:
    """The store of a process that encodes: without a memory, since it never reads what it wrote.

    A lossy encoding is tried on what this encoder makes of a few pictures first. If it does not fit, this store keeps
    exact numbers, which every reader takes; it is logged, and counted as "refused".

    Args:
        cache: the settings.
        observer: is told of every key asked for.
        encode: the encoder's own synchronous core.
        side: of the square it takes, in pixels.
    """
    encoding = Encoding(cache.encoding)
    if (
        cache.redis != "none"
        and encoding is not Encoding.EXACT
        and not is_fit(encoding, encode(rehearsal_pictures(side)))
    ):
        logger.warning("cache.encoding: %s does not fit this encoder's vectors; they are kept exact", encoding)
        observer.emit(CacheAsked(REDIS_TIER, "refused"))
        cache = cache.model_copy(update={"encoding": Encoding.EXACT.value})
    return await open_store(cache, observer, memory_bytes=0)


def password_file(cache: Cache) -> Path | None:
    """Where the password of the operator's Redis stands, if in a file."""
    return None if cache.redis_password_file is None else Path(cache.redis_password_file)


async def open_keys(cache: Cache) -> KeyRing:
    _, secret = await locate(cache)
    return KeyRing(secret)


async def locate(cache: Cache) -> tuple[str | None, bytes]:
    """URL (None for no Redis) and secret of the cache.

    Raises:
        ConfigError: an embedded server was asked for in a cluster of several machines, or a secret is missing.
    """
    if cache.redis == "none":
        return None, secrets.token_bytes(32)
    if cache.redis != "embedded":
        return cache.redis, cache_secret()
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        raise ConfigError("the embedded Redis serves one machine; give cache.redis a URL in a cluster of several")
    return await embedded_actor(cache).address.remote()


def embedded_actor(cache: Cache) -> Any:
    """The actor that owns the embedded server, created by whoever asks first."""
    options = {
        "name": ACTOR_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
    }
    return ray.remote(EmbeddedRedis).options(**options).remote(cache.embedded_max_bytes)
