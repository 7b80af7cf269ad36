"""Blobs on disk: written aside, synced, and moved into place whole.

    root/incoming/        what is being written; nothing in here is ever read
    root/tenants/XX/      one folder per tenant (named by a digest), one file per blob, under its random id

Folders are 0700 and files 0600. A blob never changes once it is in place, so a reader needs no lock, and one who has it
open can finish reading after it was removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from omnilmm.errors import Overloaded, PayloadTooLarge

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
SYNC_EVERY_BYTES = 16 * 1024 * 1024
"""Written this much, a blob is synced, so that no single sync at the end takes long."""


class StorageFull(Overloaded):
    """The disk has no room. Nothing was kept of what was being written."""

    default_code = "storage_full"


@contextmanager
def storage_errors() -> Iterator[None]:
    """Inside, a full disk is StorageFull. Other OSErrors are ours to look into and pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull("The server has no room to store this now.", retry_after=60.0) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobWriter:
    """A blob that is being written. `commit` moves it into place; leaving the context without it removes it.

    Args:
        max_bytes: more than this is refused.

    `num_bytes` and `digest` (SHA-256) tell what has been written so far.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._unsynced = 0
        self.num_bytes = 0
        with storage_errors():
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    @property
    def digest(self) -> bytes:
        return self._hash.digest()

    def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises:
            PayloadTooLarge: the blob would be over `max_bytes`.
            StorageFull: the disk is full.
        """
        if self.num_bytes + len(data) > self._max_bytes:
            raise PayloadTooLarge(f"The file may have at most {self._max_bytes} bytes.", code="file_too_large")
        rest = memoryview(data)
        with storage_errors():
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            self._unsynced += len(data)
            if self._unsynced >= SYNC_EVERY_BYTES:
                os.fdatasync(self._descriptor)
                self._unsynced = 0
        self._hash.update(data)
        self.num_bytes += len(data)

    def content(self) -> bytes:
        """What was written so far."""
        return self._path.read_bytes()

    def commit(self, path: Path) -> None:
        """Sync and move to `path`, which must be on the same file system. Raises StorageFull."""
        with storage_errors():
            os.fsync(self._descriptor)
            os.rename(self._path, path)
            sync_folder(path.parent)
        self._close()

    def abandon(self) -> None:
        """Remove what was written. Does nothing after `commit`."""
        if self._descriptor >= 0:
            self._close()
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


class BlobFolder:
    """All blobs under one root. Names are made by the store; nothing of a client's ever becomes part of a path."""

    def __init__(self, root: Path) -> None:
        self._incoming = root / "incoming"
        self._tenants = root / "tenants"
        for folder in (root, self._incoming, self._tenants):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, *, max_bytes: int) -> BlobWriter:
        return BlobWriter(self._incoming / secrets.token_hex(16), max_bytes=max_bytes)

    def commit(self, writer: BlobWriter, tenant: str, name: str) -> None:
        """Put a written blob in place under its name."""
        with storage_errors():
            self._folder(tenant).mkdir(mode=0o700, exist_ok=True)
        writer.commit(self.path(tenant, name))

    def path(self, tenant: str, name: str) -> Path:
        return self._folder(tenant) / name

    def open(self, tenant: str, name: str) -> BinaryIO:
        """Raises FileNotFoundError."""
        return self.path(tenant, name).open("rb")

    def remove(self, tenant: str, name: str) -> None:
        self.path(tenant, name).unlink(missing_ok=True)

    def incoming(self) -> Iterator[Path]:
        """Blobs somebody is writing, or was writing when the process died."""
        yield from self._incoming.iterdir()

    def blobs(self) -> Iterator[Path]:
        """Every blob in place; the file's name is the blob's."""
        for folder in self._tenants.iterdir():
            with suppress(FileNotFoundError):
                yield from folder.iterdir()

    def _folder(self, tenant: str) -> Path:
        return self._tenants / hashlib.sha256(tenant.encode()).hexdigest()[:32]
