"""The tenants' limits over the cluster's Redis: where `omnilmm.tenancy` and `omnilmm.cache.link` meet.

What an ACL user of that Redis needs on top of what the cache needs (see omnilmm/cache/redis.py):

    +eval +evalsha +time +hget +hset +pttl +pexpire +zadd +zrem +zcard +zremrangebyscore
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, ResponseError

from omnilmm.cache.breaker import Breaker
from omnilmm.cache.link import RedisLink, converse
from omnilmm.ports import Clock
from omnilmm.tenancy.governor import Governor
from omnilmm.tenancy.shared_limits import Script, SharedLimits

logger = logging.getLogger("ray.serve")


class RedisScripts:
    """Runs scripts over a link: `omnilmm.tenancy.shared_limits.Scripts`."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str]) -> Any | None:
        async def exchange(connection: AbstractConnection) -> Any:
            operands = (str(len(keys)), *keys, *args)
            (reply,) = await converse(connection, ("EVALSHA", script.sha1, *operands))
            if isinstance(reply, NoScriptError):  # a server that has not seen it, or was restarted
                (reply,) = await converse(connection, ("EVAL", script.lua, *operands))
            return reply

        reply = await self._link.run(exchange)
        if isinstance(reply, ResponseError):
            logger.warning("Redis refuses a script (%s): each router gives out its share", type(reply).__name__)
            return None
        return reply


class ClusterGovernor(Governor):
    """A Governor with a Redis link of its own. Close it when done.

    Args:
        url: as for the cache (omnilmm/cache/address.py); None without Redis: each router gives out a share.
        timeout_s: for one exchange; a slower Redis is no Redis.
        num_routers: how many routers there are.
        cache_ttl_s: how long the cache keeps a vector.
        password_file: of that Redis, if the URL has no password.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(
        self,
        url: str | None,
        *,
        clock: Clock,
        timeout_s: float,
        num_routers: int,
        cache_ttl_s: float,
        password_file: Path | None = None,
    ) -> None:
        self._link = None
        shared = None
        if url is not None:
            breaker = Breaker(clock, failures=2, open_s=1.0)
            self._link = RedisLink(url, timeout_s=timeout_s, breaker=breaker, password_file=password_file)
            shared = SharedLimits(RedisScripts(self._link))
        super().__init__(clock, shared, num_routers=num_routers, cache_ttl_s=cache_ttl_s)

    async def aclose(self) -> None:
        await super().aclose()
        if self._link is not None:
            await self._link.aclose()
