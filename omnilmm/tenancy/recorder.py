"""Receipts on their way to the ledger: kept in memory for a moment, written many at a time.

A receipt is never dropped while the process lives: what could not be written is tried again, and when too many wait
the server stops taking requests. Only a process that is killed (or a machine that goes dark) loses what it had not yet
written: the requests that ended within the last `interval_s`, or since the database went away.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Final

from omnilmm.errors import Overloaded
from omnilmm.tenancy.usage import Receipt

MAX_BATCH: Final = 1000
_RETRY_S: Final = 0.5

logger = logging.getLogger(__name__)


class UsageRecorder:
    """The queue of one process.

    Args:
        write: puts receipts into the ledger, all or nothing; raises if it could not.
        interval_s: how long a receipt may wait for others to be written with.
        max_waiting: receipts that may wait; beyond it `check_room` refuses.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Receipt]], Awaitable[None]],
        *,
        interval_s: float = 0.25,
        max_waiting: int = 20_000,
    ) -> None:
        self._write = write
        self._interval_s = interval_s
        self._max_waiting = max_waiting
        self._waiting: deque[Receipt] = deque()
        self._arrived = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_failing = False

    @property
    def num_waiting(self) -> int:
        """Receipts not yet written."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to write."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="usage recorder")

    def check_room(self) -> None:
        """Ask before a request is taken. Raises Overloaded (`usage_backlog`) when too many receipts wait."""
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded("The server cannot keep its records right now.", code="usage_backlog", retry_after=2)

    def record(self, receipt: Receipt) -> None:
        """Take a receipt. Returns at once and never refuses."""
        self._waiting.append(receipt)
        self._arrived.set()

    async def aclose(self, *, timeout_s: float = 20.0) -> None:
        """Write what waits and stop. What cannot be written in time is put into the log, one line a receipt."""
        self._closing.set()
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=timeout_s)
            self._task.cancel()
            await asyncio.wait({self._task})
        while self._waiting:
            logger.critical("receipt not written: %s", asdict(self._waiting.popleft()))

    async def _run(self) -> None:
        while not (self._closing.is_set() and not self._waiting):
            await self._arrived.wait()
            if not self._closing.is_set():
                await self._pause(self._interval_s)
            self._arrived.clear()
            while self._waiting:
                if not await self._write_some():
                    await asyncio.sleep(_RETRY_S)

    async def _write_some(self) -> bool:
        """Write the oldest receipts; they leave the queue only when they are in the ledger."""
        batch = [self._waiting[i] for i in range(min(MAX_BATCH, len(self._waiting)))]
        try:
            await self._write(batch)
        except Exception:
            if not self._is_failing:
                logger.exception("usage cannot be written; %d receipts wait", len(self._waiting))
            self._is_failing = True
            return False
        if self._is_failing:
            logger.warning("usage is written again")
        self._is_failing = False
        for _ in batch:
            self._waiting.popleft()
        return True

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            pass
