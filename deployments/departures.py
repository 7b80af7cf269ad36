"""What a revoked tenant leaves behind is taken away: its batches are cancelled and its files deleted.

Everybody who is shut out is looked at until nothing of theirs is left, and again every few minutes: an upload that was
under way still comes to an end, and a batch that is cancelled writes what it has. Nothing has to be remembered for
that, so it goes on after a restart, and every router may do it.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

from deployments.database import blocking
from deployments.files import ErasePicture
from omnilmm.batch.desk import BatchDesk
from omnilmm.errors import NotFound, OmniError
from omnilmm.files.store import Purpose, StoredFile
from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.keys import KeyBook
from omnilmm.tenancy.tenant import Tenant

LOOK_EVERY_S: Final = 2.0
LOOK_AGAIN_S: Final = 600.0
_FILES_AT_A_TIME: Final = 100

logger = logging.getLogger("ray.serve")


class Departures:
    """Clears up after revoked tenants, in the background of a router. `start` it, and `aclose` it in the end.

    Args:
        keys: knows who is revoked.
        directory: knows in which scope their pictures were kept.
        desk: their files and batches.
        erase_picture: takes a picture of theirs out of every tier of the cache.
        every_s: how often to look whether somebody was revoked.
        again_s: how often to look again at those of whom nothing was left.
    """

    def __init__(
        self,
        keys: KeyBook,
        directory: Directory,
        desk: BatchDesk,
        erase_picture: ErasePicture,
        *,
        every_s: float = LOOK_EVERY_S,
        again_s: float = LOOK_AGAIN_S,
    ) -> None:
        self._keys, self._directory, self._desk, self._erase_picture = keys, directory, desk, erase_picture
        self._every_s, self._again_s = every_s, again_s
        self._gone: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="departures")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def clear(self) -> None:
        """Take away what there is of revoked tenants, where something may be left."""
        for name in sorted(self._keys.revoked - self._gone):
            try:
                is_gone = await self._clear_tenant(name)
            except OmniError as error:  # a disk, a database or a cache that is away is back one day
                logger.warning("what a revoked tenant left is not cleared away yet (%s)", error.code)
                continue
            if is_gone:
                self._gone.add(name)

    async def _run(self) -> None:
        forget_at = asyncio.get_running_loop().time() + self._again_s
        while True:
            try:
                await self.clear()
            except Exception:
                logger.exception("could not clear up after revoked tenants")
            await asyncio.sleep(self._every_s)
            if asyncio.get_running_loop().time() >= forget_at:
                forget_at += self._again_s
                self._gone.clear()

    async def _clear_tenant(self, name: str) -> bool:
        """True if nothing was left."""
        files, batches = self._desk.files, self._desk.batches
        is_working = await blocking(batches.has_work, name)
        if is_working:
            await blocking(batches.cancel_tenant, name)
        tenant: Tenant | None = None
        while found := (await blocking(files.list, name, limit=_FILES_AT_A_TIME)).items:
            tenant = tenant or (await blocking(self._directory.tenant, name))[0].tenant()
            for stored in found:
                await self._delete(stored, tenant)
        return not is_working

    async def _delete(self, stored: StoredFile, tenant: Tenant) -> None:
        """The file, once the cache has forgotten what was made of it."""
        files = self._desk.files
        if stored.purpose is Purpose.VISION:
            with suppress(FileNotFoundError):  # another router is at it
                data = await blocking(files.blobs.path(stored.tenant, stored.id).read_bytes)
                await self._erase_picture(tenant, data)
        with suppress(NotFound):
            await blocking(files.delete, stored.tenant, stored.id)
