"""The records of batches, and who works on which.

A worker claims a batch for a while (a lease it renews) and gets a fencing token, one higher than anyone before it. All
it writes is written under the condition that the token is still the batch's: a worker that was thought dead and wakes
up finds nothing it can change (M. Kleppmann, "How to do distributed locking", 2016).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sql

from omnilmm.batch.states import TIMES, Batch, Counts, Status
from omnilmm.batch.tables import as_batch, as_columns, as_row, batches_table, segments_table
from omnilmm.database import Database, tables
from omnilmm.errors import InvalidRequest, NotFound

WINDOWS: Mapping[str, int] = {"24h": 24 * 3600}
"""Completion windows, in seconds. OpenAI has this one."""
WORKING = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)


class LeaseLost(Exception):
    """Somebody else works on this batch now: drop everything."""


class IllegalStep(Exception):
    """The batch is in a state that the wanted one cannot follow; `status` is that state."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on a batch, for as long as nobody has a higher token."""

    batch: Batch
    token: int


@dataclass(frozen=True, slots=True)
class BatchPage:
    """Part of a listing, and whether there is more after it."""

    items: tuple[Batch, ...]
    has_more: bool


class BatchStore:
    """All batches of all tenants. Methods block for as long as the database takes.

    A batch of another tenant and one that never existed are the same NotFound.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        metadata = tables(batches_table(), segments_table())
        database.require(metadata, room="batch", version=1)
        self._database = database
        self._batches, self._segments = metadata.tables["batches"], metadata.tables["batch_segments"]
        self._clock = clock

    # -- what tenants do ------------------------------------------------------------------------------

    @staticmethod
    def new_id() -> str:
        return f"batch_{secrets.token_hex(16)}"

    def create(
        self,
        tenant: str,
        batch_id: str,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        output_expires_after: int | None = None,
    ) -> Batch:
        """A new batch, in validation."""
        now = int(self._clock())
        batch = Batch(
            id=batch_id,
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            status=Status.VALIDATING,
            created_at=now,
            expires_at=now + WINDOWS[completion_window],
            output_expires_after=output_expires_after,
            metadata=tuple((metadata or {}).items()),
        )
        with self._database.write() as connection:
            connection.execute(self._batches.insert().values(**as_row(batch), token=0, lease_until=0.0))
        return batch

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises NotFound."""
        with self._database.read() as connection:
            return self._get(connection, tenant, batch_id)

    def list(self, tenant: str, *, after: str | None = None, limit: int = 20) -> BatchPage:
        """The tenant's batches, newest first, those after the batch `after`.

        Raises:
            NotFound: the tenant has no batch `after`.
        """
        columns = self._batches.c
        query = sql.select(self._batches).where(columns.tenant == tenant).order_by(columns.serial.desc())
        with self._database.read() as connection:
            if after is not None:
                mine = (columns.tenant == tenant) & (columns.id == after)
                serial = connection.scalar(sql.select(columns.serial).where(mine))
                if serial is None:
                    raise _not_found("after")
                query = query.where(columns.serial < serial)
            rows = connection.execute(query.limit(limit + 1)).all()
        return BatchPage(tuple(as_batch(row) for row in rows[:limit]), len(rows) > limit)

    def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Ask for the end of a batch; asking again changes nothing.

        Raises:
            NotFound: the tenant has no such batch.
            InvalidRequest: `batch_not_cancellable`, it has ended in another way or is writing its files.
        """
        with self._database.write() as connection:
            batch = self._get(connection, tenant, batch_id)
            if batch.status in (Status.CANCELLING, Status.CANCELLED):
                return batch
            if not batch.status.can_become(Status.CANCELLING):
                raise InvalidRequest(
                    f"A batch that is {batch.status.value} cannot be cancelled.", code="batch_not_cancellable"
                )
            self._move(connection, batch, Status.CANCELLING)
            return self._get(connection, tenant, batch_id)

    def cancel_tenant(self, tenant: str) -> int:
        """Ask for the end of everything a tenant has running; the number of batches."""
        stoppable = [status.value for status in Status if status.can_become(Status.CANCELLING)]
        query = self._batches.update().where(self._batches.c.tenant == tenant, self._batches.c.status.in_(stoppable))
        with self._database.write() as connection:
            return connection.execute(query.values(status=Status.CANCELLING.value, cancelling_at=self._now())).rowcount

    def has_work(self, tenant: str) -> bool:
        """Whether a batch of the tenant has not ended."""
        columns = self._batches.c
        working = columns.status.in_([status.value for status in WORKING])
        with self._database.read() as connection:
            return (
                connection.scalar(sql.select(columns.id).where(columns.tenant == tenant, working).limit(1)) is not None
            )

    # -- what workers do ------------------------------------------------------------------------------

    def try_claim(self, lease_s: float) -> Claim | None:
        """The next batch nobody works on: of the tenant with the fewest in work, the oldest."""
        columns = self._batches.c
        working = columns.status.in_([status.value for status in WORKING])
        now = self._clock()
        with self._database.write() as connection:
            busy = sql.select(columns.tenant, sql.func.count().label("num")).where(working, columns.lease_until > now)
            crowds = busy.group_by(columns.tenant).subquery()
            free = (
                sql.select(self._batches)
                .outerjoin(crowds, crowds.c.tenant == columns.tenant)
                .where(working, columns.lease_until <= now)
                .order_by(sql.func.coalesce(crowds.c.num, 0), columns.serial)
                .limit(1)
            )
            row = connection.execute(free).one_or_none()
            if row is None:
                return None
            seen = row._mapping["token"]
            taken = connection.execute(
                self._batches.update()
                .where(columns.id == row._mapping["id"], columns.token == seen)
                .values(token=seen + 1, lease_until=now + lease_s)
            )
            return Claim(as_batch(row), seen + 1) if taken.rowcount else None

    def renew(self, claim: Claim, lease_s: float, counts: Counts | None = None) -> Status:
        """Keep the claim, and tell how far the batch is; its status, in which a wish to cancel is seen.

        Raises:
            LeaseLost: it is somebody else's now.
        """
        changes: dict[str, Any] = {"lease_until": self._clock() + lease_s}
        if counts is not None:
            changes |= asdict(counts)
        with self._database.write() as connection:
            self._write(connection, claim, changes)
            status = connection.scalar(sql.select(self._batches.c.status).where(self._batches.c.id == claim.batch.id))
        return Status(str(status))

    def release(self, claim: Claim, *, pause_s: float = 0.0) -> None:
        """Give the claim back, for anyone to take after a pause."""
        with self._database.write() as connection:
            self._write(connection, claim, {"lease_until": self._clock() + pause_s if pause_s else 0.0})

    def seal(self, claim: Claim, lengths: Mapping[int, int]) -> dict[int, int]:
        """Fix for good how much of each earlier segment counts: `lengths` by token. What was sealed before stays.

        Raises:
            LeaseLost: it is somebody else's now.
        """
        mine = self._segments.c.batch_id == claim.batch.id
        with self._database.write() as connection:
            self._write(connection, claim, {})
            sealed = self._sealed(connection, claim)
            for token in lengths.keys() - sealed.keys():
                assert token < claim.token
                row = {"batch_id": claim.batch.id, "token": token, "num_bytes": lengths[token]}
                connection.execute(self._segments.insert().values(**row))
            rows = connection.execute(sql.select(self._segments.c.token, self._segments.c.num_bytes).where(mine))
            return {row.token: row.num_bytes for row in rows}

    def advance(
        self,
        claim: Claim,
        status: Status,
        *,
        write: Callable[[sql.Connection], None] | None = None,
        counts: Counts | None = None,
        **changes: Any,
    ) -> None:
        """Bring the batch into its next state, all in one transaction. `changes` are fields of the record; `write` is
        done in the same transaction.

        Raises:
            LeaseLost: it is somebody else's now.
            IllegalStep: the batch is meanwhile in a state that this one cannot follow, such as "cancelling".
        """
        told = as_columns(changes) | (asdict(counts) if counts is not None else {})
        with self._database.write() as connection:
            batch = self._get(connection, claim.batch.tenant, claim.batch.id)
            if not batch.status.can_become(status):
                self._write(connection, claim, {})
                raise IllegalStep(batch.status)
            self._write(connection, claim, told | {"status": status.value, TIMES[status]: self._now()})
            if write is not None:
                write(connection)

    def working_ids(self) -> frozenset[str]:
        """Batches that have not ended."""
        columns = self._batches.c
        query = sql.select(columns.id).where(columns.status.in_([status.value for status in WORKING]))
        with self._database.read() as connection:
            return frozenset(connection.scalars(query))

    def check_integrity(self) -> None:
        """Counts add up and states have their times. Raises AssertionError."""
        with self._database.read() as connection:
            batches = [as_batch(row) for row in connection.execute(sql.select(self._batches))]
        for batch in batches:
            counts = batch.counts
            assert counts.completed + counts.failed <= counts.total, f"{batch.id}: {counts}"
            if batch.status in (Status.COMPLETED, Status.CANCELLED, Status.EXPIRED):
                assert counts.completed + counts.failed == counts.total, f"{batch.id}: {counts}"
            if batch.status in TIMES:
                assert getattr(batch, TIMES[batch.status]) is not None, f"{batch.id}: no {TIMES[batch.status]}"

    # -- inside ---------------------------------------------------------------------------------------

    def _now(self) -> int:
        return int(self._clock())

    def _get(self, connection: sql.Connection, tenant: str, batch_id: str) -> Batch:
        columns = self._batches.c
        query = sql.select(self._batches).where(columns.tenant == tenant, columns.id == batch_id)
        row = connection.execute(query).one_or_none()
        if row is None:
            raise _not_found("batch_id")
        return as_batch(row)

    def _move(self, connection: sql.Connection, batch: Batch, status: Status) -> None:
        changes = {"status": status.value, TIMES[status]: self._now()}
        connection.execute(self._batches.update().where(self._batches.c.id == batch.id).values(**changes))

    def _write(self, connection: sql.Connection, claim: Claim, changes: Mapping[str, Any]) -> None:
        columns = self._batches.c
        mine = self._batches.update().where(columns.id == claim.batch.id, columns.token == claim.token)
        if connection.execute(mine.values(token=claim.token, **changes)).rowcount == 0:
            raise LeaseLost

    def _sealed(self, connection: sql.Connection, claim: Claim) -> dict[int, int]:
        columns = self._segments.c
        rows = connection.execute(
            sql.select(columns.token, columns.num_bytes).where(columns.batch_id == claim.batch.id)
        )
        return {row.token: row.num_bytes for row in rows}


def _not_found(param: str) -> NotFound:
    return NotFound("There is no such batch.", param=param, code="batch_not_found")
