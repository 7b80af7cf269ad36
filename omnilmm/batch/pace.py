"""How many lines run at a time: as many as the cluster takes, and fewer as soon as it says it has no room.

"No room" (Overloaded, RateLimited) is not a line's failure: a batch has a day, so everything waits and goes on with
half as many, growing again with every success (additive increase, multiplicative decrease; V. Jacobson, 1988). A line
that fails for another reason of ours is tried again, a few times each, and a tenth of all lines in all.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from omnilmm.errors import DeadlineExceeded, OmniError, Overloaded, RateLimited, ReplicaLost

T = TypeVar("T")

MAX_ATTEMPTS = 3
RETRY_RATIO, RETRY_RESERVE = 0.1, 10
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0

Sleep = Callable[[float], Awaitable[None]]


class SteadyTime:
    """Unix time in seconds that runs on evenly from when it was made, whatever is done to the clock meanwhile."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()


class Pace:
    """Admits lines, and tries them again.

    Args:
        max_running: lines at a time, at most.
        max_bytes: of the bodies of those lines; a bigger line runs alone.
        sleep: waits so many seconds.
    """

    def __init__(self, *, max_running: int, max_bytes: int = 256 * 1024**2, sleep: Sleep = asyncio.sleep) -> None:
        self._max_running, self._max_bytes, self._sleep = max_running, max_bytes, sleep
        self._limit = float(max_running)
        self._running = self._bytes = 0
        self._changed = asyncio.Condition()
        self._pause_s = 0.0
        self._pausing: asyncio.Task[None] | None = None
        self._retries = float(RETRY_RESERVE)

    @property
    def limit(self) -> int:
        """Lines that may run at a time now."""
        return max(1, int(self._limit))

    async def run(self, attempt: Callable[[], Awaitable[T]], *, num_bytes: int = 0) -> T:
        """The result of `attempt`, made when there is room, and made again where that makes sense.

        Raises:
            OmniError: what the last attempt raised.
        """
        self._retries += RETRY_RATIO
        num_attempts = 0
        while True:
            async with self._turn(num_bytes):
                try:
                    result = await attempt()
                except (ReplicaLost, DeadlineExceeded) as error:
                    num_attempts += 1
                    if not self._try_again(num_attempts):
                        raise
                    self._slow_down(error)
                except (Overloaded, RateLimited) as error:
                    self._slow_down(error)
                except OmniError as error:
                    num_attempts += 1
                    if error.status < 500 or not self._try_again(num_attempts):
                        raise
                else:
                    self._speed_up()
                    return result

    def _try_again(self, num_attempts: int) -> bool:
        if num_attempts >= MAX_ATTEMPTS or self._retries < 1:
            return False
        self._retries -= 1
        return True

    @asynccontextmanager
    async def _turn(self, num_bytes: int) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(num_bytes))
            self._running += 1
            self._bytes += num_bytes
        try:
            yield
        finally:
            self._running -= 1
            self._bytes -= num_bytes
            await self._wake()

    def _has_room(self, num_bytes: int) -> bool:
        fits = not self._running or self._bytes + num_bytes <= self._max_bytes
        return self._pausing is None and self._running < self.limit and fits

    def _slow_down(self, error: OmniError) -> None:
        """Halve what runs and stand still for a while: once for all lines that are refused at the same time."""
        if self._pausing is not None:
            return
        self._limit = max(1.0, self._running / 2)
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s, error.retry_after or 0.0), MAX_PAUSE_S)
        self._pausing = asyncio.get_running_loop().create_task(self._stand_still(self._pause_s))

    async def _stand_still(self, seconds: float) -> None:
        try:
            await self._sleep(seconds * random.uniform(0.8, 1.2))  # noqa: S311 - spreads workers, guards nothing
        finally:
            self._pausing = None
            await self._wake()

    def _speed_up(self) -> None:
        self._pause_s = 0.0
        self._limit = min(self._limit + 1 / self._limit, float(self._max_running))

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()
