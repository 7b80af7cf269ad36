"""Batches on a running cluster: their lines answered by a router's own service, and what must be tidied beside them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from deployments.adapters import served_to
from deployments.asking import AskService, answer_document
from deployments.database import blocking
from deployments.files import ErasePicture
from omnilmm.batch.desk import BatchDesk
from omnilmm.batch.job import WorkRules
from omnilmm.batch.worker import BatchWorker
from omnilmm.errors import NotFound, OmniError
from omnilmm.files.store import FileStore, Purpose, StoredFile
from omnilmm.tenancy.keys import Tenant

SWEEP_EVERY_S = 600.0

FindTenant = Callable[[str], Tenant]
"""The tenant of a name as it is now. Raises NotFound when there is none any more."""

logger = logging.getLogger("ray.serve")


class ServiceAnswerer:
    """`omnilmm.batch.job.Answerer` over the service that answers HTTP: the same checks, behind whatever is online."""

    def __init__(self, service: AskService, find_tenant: FindTenant) -> None:
        self._service, self._find_tenant = service, find_tenant

    def check_model(self, tenant: str, model: str) -> None:
        found = self._find_tenant(tenant)
        found.check_model(model, served_to(found, self._service.flows))

    async def answer(
        self, endpoint: str, body: Mapping[str, Any], *, tenant: str, request_id: str, batch_id: str = ""
    ) -> Mapping[str, Any]:
        found = self._find_tenant(tenant)
        return await answer_document(
            self._service, endpoint, body, tenant=found, request_id=request_id, batch_id=batch_id
        )


class BatchService:
    """What a router does for batches in the background; `start` it, and `aclose` it in the end.

    Every router may run one: claims in the database keep them from each other's batches. All of them must see the same
    folder.
    """

    def __init__(
        self,
        desk: BatchDesk,
        service: AskService,
        find_tenant: FindTenant,
        erase_picture: ErasePicture,
        *,
        rules: WorkRules | None = None,
        max_batches: int = 4,
    ) -> None:
        answerer = ServiceAnswerer(service, find_tenant)
        self._worker = BatchWorker(desk, answerer, rules, max_batches=max_batches, blocking=blocking)
        self._desk, self._find_tenant, self._erase_picture = desk, find_tenant, erase_picture
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._worker.run(), name="batch worker"),
            loop.create_task(self._sweep_again_and_again(), name="file sweeper"),
        ]

    async def aclose(self) -> None:
        """Stop. Batches in work are given back, to go on elsewhere or later."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _sweep_again_and_again(self) -> None:
        while True:
            try:
                await remove_expired(self._desk.files, self._find_tenant, self._erase_picture)
                await blocking(self._desk.sweep)
            except Exception:  # a disk or a database that is away is back one day; the sweeper must be there then
                logger.warning("could not tidy the files", exc_info=True)
            await asyncio.sleep(SWEEP_EVERY_S)


async def remove_expired(files: FileStore, find_tenant: FindTenant, erase_picture: ErasePicture) -> int:
    """Remove files past their time, and what the cache knows of the pictures among them; their number."""
    num_removed = 0
    for stored in await blocking(files.expired):
        try:
            if stored.purpose is Purpose.VISION:
                await _erase(files, stored, find_tenant, erase_picture)
            await blocking(files.remove_expired, stored)
            num_removed += 1
        except OmniError:
            logger.warning("an expired file could not be removed yet")
    return num_removed


async def _erase(files: FileStore, stored: StoredFile, find_tenant: FindTenant, erase_picture: ErasePicture) -> None:
    try:
        tenant = find_tenant(stored.tenant)
        data = await blocking(files.blobs.path(stored.tenant, stored.id).read_bytes)
    except (NotFound, FileNotFoundError):
        return  # nobody can ask for it any more
    await erase_picture(tenant, data)
