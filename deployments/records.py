"""The durable side of a router: tenants that change while it runs, and receipts on their way to disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Self

from deployments.database import blocking
from omnilmm.database import Database
from omnilmm.errors import OmniError
from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.idempotency import IdempotencyStore
from omnilmm.tenancy.keys import KeyBook
from omnilmm.tenancy.recorder import UsageRecorder
from omnilmm.tenancy.usage import Ledger, Receipt

ROSTER_EVERY_S: Final = 2.0
"""How often a router asks whether tenants or keys have changed. A revoked key is dead after this and one query, and
what began with it is ended."""

TIDY_EVERY_S: Final = 600.0
"""How often a router drops records nobody may ask for any more."""

logger = logging.getLogger("ray.serve")


class RosterWatch:
    """Keeps a KeyBook up to date with the directory.

    While the database is away the book believes what it last heard, for `omnilmm.tenancy.keys.MAX_STALE_S`.
    """

    def __init__(self, directory: Directory, keys: KeyBook, *, every_s: float = ROSTER_EVERY_S) -> None:
        self._directory = directory
        self._keys = keys
        self._every_s = every_s
        self._version = -1
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the directory, and go on asking. Raises what the directory raises."""
        await self.refresh()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="roster watch")

    async def refresh(self) -> None:
        """Ask once."""
        if await blocking(self._directory.version) == self._version:
            self._keys.confirm()
            return
        roster = await blocking(self._directory.roster)
        self._keys.learn(roster)
        self._version = roster.version

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        is_failing = False
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.refresh()
            except OmniError as error:
                if not is_failing:
                    logger.warning("tenants and keys cannot be read (%s): the last known ones are used", error.code)
                is_failing = True
            except Exception:
                logger.exception("tenants and keys could not be read")
            else:
                is_failing = False


class Records:
    """What one router keeps in the database. Open it with `open`, close it at the end of the drain.

    Attributes:
        directory: tenants and keys.
        ledger: receipts and daily sums.
        recorder: takes the receipts of this router.
        idempotency: claims of Idempotency-Key.
    """

    def __init__(self, database: Database, keys: KeyBook) -> None:
        self.database: Final = database
        self.directory: Final = Directory(database)
        self.ledger: Final = Ledger(database)
        self.idempotency: Final = IdempotencyStore(database)
        self.recorder: Final = UsageRecorder(self._write)
        self._watch = RosterWatch(self.directory, keys)
        self._tidying: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, url: str, keys: KeyBook) -> Self:
        """Open the database, make the tables that are missing, teach `keys` the directory and keep it up to date.

        Raises:
            ConfigError: the URL cannot be used, or the tables are of another version.
            Overloaded: the database cannot be reached.
        """
        database = await blocking(Database, url)
        try:
            records = await blocking(cls, database, keys)
            await records._watch.start()
        except BaseException:
            database.close()
            raise
        records.recorder.start()
        records._tidying = asyncio.get_running_loop().create_task(records.tidy_forever(), name="record tidier")
        return records

    async def tidy_forever(self, *, every_s: float = TIDY_EVERY_S) -> None:
        """Drop old claims of idempotency keys, again and again. Every router does; whoever comes first finds them."""
        while True:
            try:
                await blocking(self.idempotency.forget_old)
            except Exception:  # a database that is away is back one day; the tidier must be there then
                logger.warning("could not tidy the records", exc_info=True)
            await asyncio.sleep(every_s)

    async def aclose(self) -> None:
        """Write every receipt, then close. Call when no request runs any more."""
        await self._watch.aclose()
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.wait({self._tidying})
        await self.recorder.aclose()
        await blocking(self.database.close)

    async def _write(self, receipts: Sequence[Receipt]) -> None:
        await blocking(self.ledger.write, receipts)
