"""Where tenants hand batches in: checks, a snapshot of the input, a record."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from omnilmm.batch.states import Batch
from omnilmm.batch.store import BatchStore
from omnilmm.errors import InvalidRequest, NotFound
from omnilmm.files.blobs import storage_errors
from omnilmm.files.store import FileStore, Purpose

INPUT = "input.jsonl"
ORPHAN_AGE_S = 3600.0


class WorkFolders:
    """A folder per batch in work: the snapshot of its input, and its journal. Same file system as the blobs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, batch_id: str) -> Path:
        """Raises StorageFull."""
        with storage_errors():
            self.path(batch_id).mkdir(mode=0o700)
        return self.path(batch_id)

    def path(self, batch_id: str) -> Path:
        return self._root / batch_id

    def remove(self, batch_id: str) -> None:
        shutil.rmtree(self.path(batch_id), ignore_errors=True)

    def sweep(self, working: frozenset[str]) -> int:
        """Remove folders of batches that are not in work any more, or never came to be; their number."""
        young = time.time() - ORPHAN_AGE_S
        num_removed = 0
        for folder in self._root.iterdir():
            with suppress(FileNotFoundError):
                if folder.name not in working and folder.stat().st_mtime < young:
                    self.remove(folder.name)
                    num_removed += 1
        return num_removed


class BatchDesk:
    """Takes batches in. The input is linked into the batch's own folder, so it may be deleted at once."""

    def __init__(self, batches: BatchStore, files: FileStore, folders: WorkFolders) -> None:
        self.batches, self.files, self.folders = batches, files, folders

    def submit(
        self,
        tenant: str,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        metadata: Mapping[str, str] | None = None,
        output_expires_after: int | None = None,
    ) -> Batch:
        """A new batch, in validation.

        Raises:
            NotFound: the tenant has no such file.
            InvalidRequest: the file was not uploaded for batches.
            StorageFull: the disk is full.
        """
        try:
            stored = self.files.get(tenant, input_file_id)
        except NotFound as missing:
            missing.param = "input_file_id"
            raise
        if stored.purpose is not Purpose.BATCH:
            raise InvalidRequest(
                "The input file was not uploaded with the purpose 'batch'.",
                param="input_file_id",
                code="invalid_file_purpose",
            )
        batch_id = self.batches.new_id()
        folder = self.folders.create(batch_id)
        try:
            self.files.link(tenant, input_file_id, folder / INPUT)
            return self.batches.create(
                tenant,
                batch_id,
                endpoint=endpoint,
                input_file_id=input_file_id,
                completion_window=completion_window,
                metadata=metadata,
                output_expires_after=output_expires_after,
            )
        except InvalidRequest:
            self.folders.remove(batch_id)
            raise

    def sweep(self) -> int:
        """Remove what crashes left behind, of batches and of files; how many things."""
        return self.folders.sweep(self.batches.working_ids()) + self.files.sweep()
