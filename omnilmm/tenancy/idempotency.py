"""Idempotency-Key: a POST that is sent again is carried out once (IETF draft-ietf-httpapi-idempotency-key-header).

For each tenant, operation and key there is one claim:

    nobody was here            carry it out, then `finish` with the answer (or `abandon` if it was refused untried)
    the same body, finished    the saved answer, whatever it was
    the same body, under way   409 `idempotency_in_progress`: try again in a moment (OpenAI's clients do)
    another body               422 `idempotency_key_reused`

A claim whose holder died is taken over after `lease_s`; what the dead one writes afterwards is refused. Answers are
kept for a day.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sql

from omnilmm.database import Database, tables
from omnilmm.errors import InvalidRequest, OmniError

ROOM: Final = "idempotency"
VERSION: Final = 1
MAX_ANSWER_BYTES: Final = 1 << 20
_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")


class IdempotencyInProgress(OmniError):
    """The first request with this key has not ended."""

    status = 409
    type = "invalid_request_error"
    default_code = "idempotency_in_progress"


class IdempotencyKeyReused(OmniError):
    """The key belongs to another request."""

    status = 422
    type = "invalid_request_error"
    default_code = "idempotency_key_reused"


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to carry out one operation. `token` is known to its holder alone."""

    tenant: str
    operation: str
    key: str
    token: str


@dataclass(frozen=True, slots=True)
class SavedAnswer:
    """What the first request was told."""

    status: int
    body: bytes


def check_idempotency_key(value: str | None) -> str | None:
    """The header Idempotency-Key, or None where there is none.

    Raises:
        InvalidRequest: not 1 to 255 printable ASCII characters without spaces.
    """
    if value is not None and not _KEY.fullmatch(value):
        raise InvalidRequest(
            "The header Idempotency-Key must be 1 to 255 printable ASCII characters.", param="idempotency-key"
        )
    return value


def fingerprint(*parts: bytes) -> str:
    """Names a request by its parts. A multipart body is named by its fields: its boundary changes with every try."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


class IdempotencyStore:
    """Claims and answers in durable records. All calls block; see `omnilmm.database`.

    Args:
        lease_s: after this long a request that did not end counts as dead. Longer than any such request may take.
        keep_s: how long answers are kept.
        wall: Unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float = 600.0,
        keep_s: float = 86_400.0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        metadata = tables(
            (
                "idempotency",
                (
                    sql.Column("tenant", sql.String(64), primary_key=True),
                    sql.Column("operation", sql.String(64), primary_key=True),
                    sql.Column("key", sql.String(255), primary_key=True),
                    sql.Column("fingerprint", sql.String(64), nullable=False),
                    sql.Column("token", sql.String(32), nullable=False),
                    sql.Column("begun_at", sql.Float(53), nullable=False, index=True),
                    sql.Column("status", sql.Integer),
                    sql.Column("body", sql.LargeBinary),
                ),
            )
        )
        database.require(metadata, room=ROOM, version=VERSION)
        self._database = database
        self._claims = metadata.tables["idempotency"]
        self._lease_s = lease_s
        self._keep_s = keep_s
        self._wall = wall

    def begin(self, tenant: str, operation: str, key: str, fingerprint: str) -> Claim | SavedAnswer:
        """The right to go on, or the answer there is already. A Claim must be finished or abandoned.

        Raises:
            IdempotencyInProgress: the same request is under way.
            IdempotencyKeyReused: the key came with another body before.
        """
        now = self._wall()
        claim = Claim(tenant, operation, key, secrets.token_hex(16))
        where = self._of(claim)
        row: dict[str, object] = {"tenant": tenant, "operation": operation, "key": key, "fingerprint": fingerprint}
        row |= {"token": claim.token, "begun_at": now}
        with self._database.write() as connection:
            stale = where & self._is_over(now)
            connection.execute(sql.delete(self._claims).where(stale))
            self._database.insert_new(connection, self._claims, [row], key=("tenant", "operation", "key"))
            found = connection.execute(sql.select(self._claims).where(where)).one()
        if found.token == claim.token:
            return claim
        if found.fingerprint != fingerprint:
            raise IdempotencyKeyReused("This Idempotency-Key was used for another request.", param="idempotency-key")
        if found.status is None:
            raise IdempotencyInProgress(
                "A request with this Idempotency-Key is under way.", param="idempotency-key", retry_after=1
            )
        return SavedAnswer(found.status, found.body)

    def finish(self, claim: Claim, answer: SavedAnswer) -> bool:
        """Save the answer. False if the claim was taken over meanwhile: somebody else's answer stands.

        Raises:
            ValueError: the body is over MAX_ANSWER_BYTES.
        """
        if len(answer.body) > MAX_ANSWER_BYTES:
            raise ValueError("an answer this long is not saved")
        with self._database.write() as connection:
            mine = self._of(claim) & (self._claims.c.token == claim.token)
            written = sql.update(self._claims).where(mine).values(status=answer.status, body=answer.body)
            return connection.execute(written).rowcount == 1

    def abandon(self, claim: Claim) -> None:
        """Nothing was carried out: the key may be used again."""
        with self._database.write() as connection:
            mine = self._of(claim) & (self._claims.c.token == claim.token) & self._claims.c.status.is_(None)
            connection.execute(sql.delete(self._claims).where(mine))

    def forget_old(self) -> int:
        """Drop what nobody may ask for any more. Returns how many claims there were."""
        with self._database.write() as connection:
            return connection.execute(sql.delete(self._claims).where(self._is_over(self._wall()))).rowcount

    def _of(self, claim: Claim) -> sql.ColumnElement[bool]:
        table = self._claims.c
        return sql.and_(table.tenant == claim.tenant, table.operation == claim.operation, table.key == claim.key)

    def _is_over(self, now: float) -> sql.ColumnElement[bool]:
        """Saved longer ago than answers are kept, or begun longer ago than any request takes."""
        table = self._claims.c
        saved = sql.and_(table.status.is_not(None), table.begun_at <= now - self._keep_s)
        dead = sql.and_(table.status.is_(None), table.begun_at <= now - self._lease_s)
        return sql.or_(saved, dead)
