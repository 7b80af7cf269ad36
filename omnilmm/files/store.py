"""Tenant-owned files: a blob on disk, a record in the database.

The record is what counts. A blob comes first and its record makes it exist; a record goes first and its blob follows.
What a crash leaves in between is a blob without a record, which `sweep` removes.

A file of another tenant, a deleted, an expired and a never existing one are all the same NotFound.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import sqlalchemy as sql
from sqlalchemy.schema import SchemaItem

from omnilmm.database import Database, tables
from omnilmm.errors import Forbidden, NotFound
from omnilmm.files.blobs import BlobFolder, BlobWriter, storage_errors

ORPHAN_AGE_S = 3600.0
"""A blob without a record is younger than this while its upload may still be under way."""

Order = Literal["asc", "desc"]


class Purpose(StrEnum):
    BATCH = "batch"  # lines for a batch
    BATCH_OUTPUT = "batch_output"  # what a batch wrote
    VISION = "vision"  # a picture to be referred to in requests
    USER_DATA = "user_data"  # anything


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file's record. Times are Unix seconds; `digest` is the hex SHA-256 of the content."""

    id: str
    tenant: str
    purpose: Purpose
    filename: str
    num_bytes: int
    digest: str
    created_at: int
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class FilePage:
    """Part of a listing, and whether there is more after it."""

    items: tuple[StoredFile, ...]
    has_more: bool


class Upload:
    """A file that is being received. `finish` makes it exist; leaving the context without it leaves nothing."""

    def __init__(self, store: FileStore, writer: BlobWriter, tenant: str) -> None:
        self._store, self._writer, self._tenant = store, writer, tenant

    @property
    def num_bytes(self) -> int:
        return self._writer.num_bytes

    def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises:
            PayloadTooLarge: over the cap.
            StorageFull: the disk is full.
        """
        self._writer.write(data)

    @property
    def digest(self) -> bytes:
        """SHA-256 of what was received so far."""
        return self._writer.digest

    def content(self) -> bytes:
        """What was received so far."""
        return self._writer.content()

    def finish(self, *, purpose: Purpose, filename: str, expires_after: int | None = None) -> StoredFile:
        """Put the blob in place and write its record. `expires_after` in seconds.

        Raises:
            StorageFull: the disk is full.
            Forbidden: the tenant's files would take more than its quota.
        """
        stored = self.place(purpose=purpose, filename=filename, expires_after=expires_after)
        try:
            with self._store.database.write() as connection:
                self._store.insert(connection, stored)
        except Forbidden:  # after any other failure the record may exist after all; `sweep` will know
            self._store.discard(stored)
            raise
        return stored

    def place(self, *, purpose: Purpose, filename: str, expires_after: int | None = None) -> StoredFile:
        """Put the blob in place; the caller sees to it that `FileStore.insert` or `discard` follows."""
        stored = self._store.describe(
            self._tenant, self._writer, purpose=purpose, filename=filename, expires_after=expires_after
        )
        self._store.blobs.commit(self._writer, self._tenant, stored.id)
        return stored

    def abandon(self) -> None:
        self._writer.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


class FileStore:
    """All files of all tenants.

    Methods block for as long as the disk takes: call them where that is allowed.

    Args:
        database: the durable one.
        root: folder for the blobs; the same one for every process that serves the same database.
        max_tenant_bytes: what one tenant's files may take together.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        root: Path,
        *,
        max_tenant_bytes: int = 20 * 1024**3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        metadata = tables(_files())
        database.require(metadata, room="files", version=1)
        self.database = database
        self._files = metadata.tables["files"]
        self._max_tenant_bytes = max_tenant_bytes
        self._clock = clock
        self.blobs = BlobFolder(root)

    # -- writing --------------------------------------------------------------------------------------

    def upload(self, tenant: str, *, max_bytes: int) -> Upload:
        """Begin to receive a file of at most so many bytes. Raises StorageFull."""
        return Upload(self, self.blobs.create(max_bytes=max_bytes), tenant)

    def describe(
        self, tenant: str, writer: BlobWriter, *, purpose: Purpose, filename: str, expires_after: int | None
    ) -> StoredFile:
        """A record, under a fresh id, for what was written."""
        now = int(self._clock())
        return StoredFile(
            id=f"file-{secrets.token_hex(16)}",
            tenant=tenant,
            purpose=purpose,
            filename=filename,
            num_bytes=writer.num_bytes,
            digest=writer.digest.hex(),
            created_at=now,
            expires_at=None if expires_after is None else now + expires_after,
        )

    def insert(self, connection: sql.Connection, stored: StoredFile) -> None:
        """Make a placed blob exist, in the caller's transaction. What jobs write counts, but is never refused.

        Raises:
            Forbidden: the tenant's quota is used up.
        """
        table = self._files
        if stored.purpose is not Purpose.BATCH_OUTPUT:
            total = sql.select(sql.func.coalesce(sql.func.sum(table.c.num_bytes), 0)).where(
                table.c.tenant == stored.tenant
            )
            if (connection.scalar(total) or 0) + stored.num_bytes > self._max_tenant_bytes:
                raise Forbidden(
                    f"Your files may take {self._max_tenant_bytes} bytes together; delete some first.",
                    code="storage_quota_exceeded",
                )
        connection.execute(
            table.insert().values(
                id=stored.id,
                tenant=stored.tenant,
                purpose=stored.purpose.value,
                filename=stored.filename,
                num_bytes=stored.num_bytes,
                digest=stored.digest,
                created_at=stored.created_at,
                expires_at=stored.expires_at,
            )
        )

    def discard(self, stored: StoredFile) -> None:
        """Remove a placed blob that never came to exist."""
        self.blobs.remove(stored.tenant, stored.id)

    # -- reading --------------------------------------------------------------------------------------

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Raises NotFound."""
        with self.database.read() as connection:
            row = connection.execute(self._mine(tenant).where(self._files.c.id == file_id)).one_or_none()
        if row is None:
            raise _not_found()
        return _stored(row)

    def open(self, tenant: str, file_id: str) -> BinaryIO:
        """The content, from its beginning; the caller closes it. Raises NotFound."""
        stored = self.get(tenant, file_id)
        try:
            return self.blobs.open(tenant, stored.id)
        except FileNotFoundError:
            raise _not_found() from None  # deleted between the two

    async def read(self, tenant: str, file_id: str) -> bytes:
        """The whole content of a file small enough to be a picture. Raises NotFound."""
        with self.open(tenant, file_id) as file:
            return file.read()

    def list(
        self,
        tenant: str,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Order = "desc",
        purpose: Purpose | None = None,
    ) -> FilePage:
        """The tenant's files by age, newest first unless told otherwise, those after the file `after`.

        Raises:
            NotFound: the tenant has no file `after`.
        """
        serial = self._files.c.serial
        query = self._mine(tenant).order_by(serial.desc() if order == "desc" else serial.asc())
        if purpose is not None:
            query = query.where(self._files.c.purpose == purpose.value)
        with self.database.read() as connection:
            if after is not None:
                mine = (self._files.c.tenant == tenant) & (self._files.c.id == after)
                at = connection.scalar(sql.select(serial).where(mine))
                if at is None:
                    raise _not_found("after")
                query = query.where(serial < at if order == "desc" else serial > at)
            rows = connection.execute(query.limit(limit + 1)).all()
        return FilePage(tuple(_stored(row) for row in rows[:limit]), len(rows) > limit)

    def link(self, tenant: str, file_id: str, path: Path) -> StoredFile:
        """Give the content a second name, so that it outlives the file's deletion. Raises NotFound, StorageFull."""
        stored = self.get(tenant, file_id)
        try:
            with storage_errors():
                os.link(self.blobs.path(tenant, stored.id), path)
        except FileNotFoundError:
            raise _not_found() from None
        return stored

    # -- removing -------------------------------------------------------------------------------------

    def delete(self, tenant: str, file_id: str) -> StoredFile:
        """Raises NotFound."""
        stored = self.get(tenant, file_id)
        with self.database.write() as connection:
            gone = connection.execute(self._files.delete().where(self._files.c.id == file_id))
        if gone.rowcount == 0:
            raise _not_found()  # somebody was quicker
        self.discard(stored)
        return stored

    def delete_tenant(self, tenant: str) -> int:
        """Delete everything a tenant has; the number of files."""
        num_deleted = 0
        while files := self.list(tenant, limit=1000).items:
            for stored in files:
                with suppress(NotFound):
                    self.delete(tenant, stored.id)
                    num_deleted += 1
        return num_deleted

    def expired(self, limit: int = 1000) -> Sequence[StoredFile]:
        """Files past their time that are still there. They are no longer found; `remove_expired` frees the disk."""
        query = sql.select(self._files).where(self._files.c.expires_at <= self._clock()).limit(limit)
        with self.database.read() as connection:
            return [_stored(row) for row in connection.execute(query)]

    def remove_expired(self, stored: StoredFile) -> None:
        with self.database.write() as connection:
            connection.execute(self._files.delete().where(self._files.c.id == stored.id))
        self.discard(stored)

    def sweep(self) -> int:
        """Remove blobs without a record that are too old to be in the making; their number."""
        num_removed = 0
        young = time.time() - ORPHAN_AGE_S  # the file system's clock
        known = self._ids()
        candidates = [*self.blobs.incoming(), *(blob for blob in self.blobs.blobs() if blob.name not in known)]
        for blob in candidates:
            with suppress(FileNotFoundError):
                if blob.stat().st_mtime < young:
                    blob.unlink()
                    num_removed += 1
        return num_removed

    def check_integrity(self) -> None:
        """Every record has its blob, of the right size. Raises AssertionError."""
        with self.database.read() as connection:
            records = [_stored(row) for row in connection.execute(sql.select(self._files))]
        sizes = {blob.name: blob.stat().st_size for blob in self.blobs.blobs()}
        for stored in records:
            assert sizes.get(stored.id) == stored.num_bytes, f"{stored.id}: {sizes.get(stored.id)} bytes on disk"

    def _ids(self) -> frozenset[str]:
        with self.database.read() as connection:
            return frozenset(connection.scalars(sql.select(self._files.c.id)))

    def _mine(self, tenant: str) -> sql.Select:
        """What the tenant has and what is not past its time."""
        columns = self._files.c
        alive = columns.expires_at.is_(None) | (columns.expires_at > self._clock())
        return sql.select(self._files).where(columns.tenant == tenant, alive)


def _files() -> tuple[str, Sequence[SchemaItem]]:
    """The table of records. `serial` is the order of creation."""
    return "files", (
        sql.Column("serial", sql.Integer, primary_key=True, autoincrement=True),
        sql.Column("id", sql.String(64), nullable=False, unique=True),
        sql.Column("tenant", sql.String(64), nullable=False),
        sql.Column("purpose", sql.String(32), nullable=False),
        sql.Column("filename", sql.String(255), nullable=False),
        sql.Column("num_bytes", sql.BigInteger, nullable=False),
        sql.Column("digest", sql.String(64), nullable=False),
        sql.Column("created_at", sql.BigInteger, nullable=False),
        sql.Column("expires_at", sql.BigInteger, nullable=True, index=True),
        sql.Index("files_of_tenant", "tenant", "serial"),
    )


def _stored(row: sql.Row) -> StoredFile:
    fields = row._mapping
    return StoredFile(
        id=fields["id"],
        tenant=fields["tenant"],
        purpose=Purpose(fields["purpose"]),
        filename=fields["filename"],
        num_bytes=fields["num_bytes"],
        digest=fields["digest"],
        created_at=fields["created_at"],
        expires_at=fields["expires_at"],
    )


def _not_found(param: str = "file_id") -> NotFound:
    return NotFound("There is no such file.", param=param, code="file_not_found")
