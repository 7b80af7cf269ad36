"""The worker: takes batches as they come and works on a few at a time, for as long as it runs.

Any number of workers may run, in any number of processes: claims keep them apart, and a batch whose worker dies is
taken up by another as soon as its lease has run out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from omnilmm.batch.desk import BatchDesk
from omnilmm.batch.job import Answerer, Blocking, Job, WorkRules, in_place
from omnilmm.batch.pace import SteadyTime
from omnilmm.batch.store import Claim, LeaseLost
from omnilmm.errors import OmniError, Overloaded

RETRY_S = 15.0

_log = logging.getLogger(__name__)


class BatchWorker:
    """Works on batches.

    Args:
        max_batches: at a time.
        blocking: how to make the calls to disk and database.
        poll_s: how often to look for a batch while there is none.
    """

    def __init__(
        self,
        desk: BatchDesk,
        answerer: Answerer,
        rules: WorkRules | None = None,
        *,
        max_batches: int = 4,
        poll_s: float = 1.0,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        blocking: Blocking = in_place,
    ) -> None:
        self._desk, self._answerer, self._rules = desk, answerer, rules or WorkRules()
        self._max_batches, self._poll_s = max_batches, poll_s
        self._clock, self._sleep, self._blocking = clock or SteadyTime(), sleep, blocking

    async def run(self) -> None:
        """Work until cancelled; what is in work is then given back."""
        jobs: set[asyncio.Task[None]] = set()
        try:
            while True:
                claim = await self._try_claim() if len(jobs) < self._max_batches else None
                if claim is not None:
                    jobs.add(asyncio.ensure_future(self._work(claim)))
                    continue
                pause = asyncio.ensure_future(self._sleep(self._poll_s))
                try:
                    await asyncio.wait({pause, *jobs}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    pause.cancel()
                jobs = {job for job in jobs if not job.done()}
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def run_one(self) -> bool:
        """Work on the next batch until it ends; False if there is none."""
        claim = await self._try_claim()
        if claim is not None:
            await self._work(claim)
        return claim is not None

    async def _try_claim(self) -> Claim | None:
        try:
            return await self._blocking(self._desk.batches.try_claim, self._rules.lease_s)
        except Overloaded:
            return None

    async def _work(self, claim: Claim) -> None:
        pause_s = 0.0
        try:
            job = Job(
                self._desk,
                claim,
                self._answerer,
                self._rules,
                clock=self._clock,
                sleep=self._sleep,
                blocking=self._blocking,
            )
            await job.run()
            return
        except LeaseLost:
            _log.warning("another worker took %s over", claim.batch.id)
            return
        except OmniError as error:  # no room on the disk or in the database: it goes on from where it is
            _log.warning("%s waits: %s", claim.batch.id, error.code)
            pause_s = error.retry_after or RETRY_S
        except Exception:
            _log.exception("work on %s failed", claim.batch.id)
            pause_s = RETRY_S
        finally:
            with suppress(LeaseLost, OmniError):
                await self._blocking(self._desk.batches.release, claim, pause_s=pause_s)
