"""What one process erases, every memory forgets: within about a second, or an hour's outage later.

Redis holds a list of erased names with the time of each, for an hour. Every process with a memory reads what is new on
it once a second. Polling, not pub/sub: a message nobody heard during an outage would never be heard.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from omnilmm.cache.redis import RedisTier

POLL_S: Final = 1.0

_log = logging.getLogger(__name__)


class ErasureWatch:
    """Keeps one memory free of what any process has erased. `begin` it on the loop it lives on; close it at the end.

    Args:
        redis: where erased names are listed.
        drop: forgets a name; None means everything, since the list no longer reaches back far enough.
        every_s: time between two looks.
    """

    def __init__(self, redis: RedisTier, drop: Callable[[str | None], None], *, every_s: float = POLL_S) -> None:
        self._redis = redis
        self._drop = drop
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None
        self._seen_ms: int | None = None

    def begin(self) -> None:
        """Watch from now on. Does nothing if it does already."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch(), name="erased pictures")

    async def look(self) -> None:
        """Read the list once."""
        if self._redis.is_down:
            await self._redis.find(())  # lets a probe find out that it is back
            return
        news = await self._redis.erased_since(self._seen_ms)
        if news is None:
            return
        for name in news.names:
            self._drop(name)
        self._seen_ms = news.now_ms

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _watch(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # the cache is optional, and so is hearing of what was erased: the next look is soon
                _log.exception("could not read what was erased")
            await asyncio.sleep(self._every_s)
