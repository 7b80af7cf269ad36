"""Files and batches of a router: what keeps them, what answers the lines, and what tidies up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from deployments.asking import AskService
from deployments.batch import BatchService
from deployments.database import blocking
from deployments.files import ErasePicture
from omnilmm.api.endpoints import ENDPOINTS
from omnilmm.batch.desk import BatchDesk, WorkFolders
from omnilmm.batch.pace import SteadyTime
from omnilmm.batch.store import BatchStore
from omnilmm.database import Database
from omnilmm.files.store import FileStore
from omnilmm.tenancy.keys import KeyBook


class Storage:
    """The stores and the background work over them. Every router has one over the same database and folder.

    Attributes:
        files: uploaded files.
        desk: where batches are handed in.
        endpoints: the paths a line of a batch may name.
    """

    def __init__(self, database: Database, folder: Path, *, max_tenant_bytes: int) -> None:
        clock = SteadyTime()
        self.files: Final = FileStore(database, folder / "files", max_tenant_bytes=max_tenant_bytes, clock=clock)
        batches = BatchStore(database, clock=clock)
        self.desk: Final = BatchDesk(batches, self.files, WorkFolders(folder / "batches"))
        self.endpoints: Final[Sequence[str]] = tuple(ENDPOINTS)
        self._service: BatchService | None = None

    @classmethod
    async def open(cls, database: Database, folder: Path, *, max_tenant_bytes: int) -> Storage:
        """Open the stores; their tables and folders are made if they are missing."""
        return await blocking(cls, database, folder, max_tenant_bytes=max_tenant_bytes)

    def start(self, service: AskService, keys: KeyBook, erase_picture: ErasePicture) -> None:
        """Begin to answer batches, as the tenants that `keys` knows."""
        self._service = BatchService(self.desk, service, keys.tenant, erase_picture)
        self._service.start()

    async def aclose(self) -> None:
        """Give batches in work back."""
        if self._service is not None:
            await self._service.aclose()
