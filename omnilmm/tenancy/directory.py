"""Tenants and their keys in durable records: what the operator changes while the servers run.

Every change raises one version number in the same transaction, so a server asks for a single number every few seconds
and reads the rest only when it moved. Nothing is ever deleted: receipts refer to tenants and keys, and a name that
was used once must not be given to somebody who would find the first one's pictures in the cache.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError

from omnilmm.database import Database, tables
from omnilmm.errors import InvalidRequest, NotFound
from omnilmm.tenancy.access import is_within
from omnilmm.tenancy.keys import KeyRecord, Roster, new_key
from omnilmm.tenancy.profile import TenantProfile, check_models, check_name, check_seconds

ROOM: Final = "tenancy"
VERSION: Final = 1
MAX_KEYS_PER_TENANT: Final = 100
DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as the operator sees it: everything but the key. Unix times in seconds."""

    id: str
    tenant: str
    models: tuple[str, ...] | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    def is_live(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "models": None if self.models is None else list(self.models)}


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made. `secret` is shown once and kept nowhere."""

    secret: str
    info: KeyInfo


class Directory:
    """The records of tenants and keys. All calls block; see `omnilmm.database`.

    Args:
        database: the durable one.
        wall: Unix time in seconds.
    """

    def __init__(self, database: Database, *, wall: Callable[[], float] = time.time) -> None:
        metadata = tables(
            (
                "tenants",
                (
                    sql.Column("name", sql.String(64), primary_key=True),
                    sql.Column("profile", sql.Text, nullable=False),
                    sql.Column("created_at", sql.Float(53), nullable=False),
                    sql.Column("revoked_at", sql.Float(53)),
                ),
            ),
            (
                "tenant_keys",
                (
                    sql.Column("id", sql.String(32), primary_key=True),
                    sql.Column("tenant", sql.String(64), sql.ForeignKey("tenants.name"), nullable=False, index=True),
                    sql.Column("digest", sql.String(64), nullable=False, unique=True),
                    sql.Column("models", sql.Text),
                    sql.Column("created_at", sql.Float(53), nullable=False),
                    sql.Column("expires_at", sql.Float(53)),
                    sql.Column("revoked_at", sql.Float(53)),
                ),
            ),
            (
                "tenancy_version",
                (
                    sql.Column("id", sql.Integer, primary_key=True, autoincrement=False),
                    sql.Column("version", sql.BigInteger, nullable=False),
                ),
            ),
        )
        database.require(metadata, room=ROOM, version=VERSION)
        self._database = database
        self._wall = wall
        self._tenants = metadata.tables["tenants"]
        self._keys = metadata.tables["tenant_keys"]
        self._version = metadata.tables["tenancy_version"]

    # -- for the servers ------------------------------------------------------------------------------

    def version(self) -> int:
        """A number that moves with every change; 0 before the first."""
        with self._database.read() as connection:
            return connection.scalar(sql.select(self._version.c.version)) or 0

    def roster(self) -> Roster:
        """All live tenants and keys, of one moment. Keys that will expire are told with their time."""
        with self._database.read() as connection:
            version = connection.scalar(sql.select(self._version.c.version)) or 0
            tenants = connection.execute(sql.select(self._tenants)).all()
            keys = connection.execute(sql.select(self._keys)).all()
        live = {row.name: _profile(row).tenant() for row in tenants if row.revoked_at is None}
        records = (
            KeyRecord(
                row.digest,
                live[row.tenant],
                id=row.id,
                models=None if row.models is None else frozenset(json.loads(row.models)),
                expires_at=row.expires_at,
            )
            for row in keys
            if row.revoked_at is None and row.tenant in live
        )
        revoked = frozenset(row.name for row in tenants if row.revoked_at is not None)
        return Roster(version, tuple(records), live, revoked, had_keys=bool(keys))

    # -- for the operator -----------------------------------------------------------------------------

    def add(self, name: str, changes: Mapping[str, object]) -> TenantProfile:
        """A new tenant, without a key yet. `changes` as for `TenantProfile.changed`.

        Raises:
            InvalidRequest: what `changed` raises; `already_exists` for a name that is or was in use.
        """
        profile = TenantProfile(check_name(name, "name")).changed(changes)
        row = {"name": profile.name, "profile": json.dumps(profile.document()), "created_at": self._wall()}
        try:
            with self._changing() as connection:
                connection.execute(sql.insert(self._tenants).values(row))
        except IntegrityError:
            raise InvalidRequest(
                "There is or was a tenant of this name.", param="name", code="already_exists"
            ) from None
        return profile

    def change(self, name: str, changes: Mapping[str, object]) -> TenantProfile:
        """Change a live tenant.

        Raises:
            NotFound: there is none of this name.
            InvalidRequest: what `TenantProfile.changed` raises.
        """
        with self._changing() as connection:
            profile = _profile(self._live(connection, name)).changed(changes)
            written = sql.update(self._tenants).where(self._tenants.c.name == name)
            connection.execute(written.values(profile=json.dumps(profile.document())))
        return profile

    def tenants(self) -> list[tuple[TenantProfile, bool]]:
        """All tenants by name, and whether they are live."""
        with self._database.read() as connection:
            rows = connection.execute(sql.select(self._tenants).order_by(self._tenants.c.name)).all()
        return [(_profile(row), row.revoked_at is None) for row in rows]

    def tenant(self, name: str) -> tuple[TenantProfile, bool]:
        """One tenant, and whether it is live. Raises NotFound."""
        for profile, is_live in self.tenants():
            if profile.name == name:
                return profile, is_live
        raise _no_tenant()

    def keys(self, name: str) -> list[KeyInfo]:
        """The keys a tenant has or had, oldest first."""
        found = sql.select(self._keys).where(self._keys.c.tenant == name)
        with self._database.read() as connection:
            rows = connection.execute(found.order_by(self._keys.c.created_at, self._keys.c.id)).all()
        return [_info(row) for row in rows]

    def revoke(self, name: str) -> None:
        """Shut a tenant out, with all its keys, for good. Raises NotFound."""
        now = self._wall()
        with self._changing() as connection:
            self._live(connection, name)
            connection.execute(sql.update(self._tenants).where(self._tenants.c.name == name).values(revoked_at=now))
            mine = (self._keys.c.tenant == name) & self._keys.c.revoked_at.is_(None)
            connection.execute(sql.update(self._keys).where(mine).values(revoked_at=now))

    def add_key(self, name: str, *, models: object = None, lasts_s: object = None) -> NewKey:
        """A new key for a live tenant. `models` can only narrow what the tenant may use.

        Raises:
            NotFound: there is no such tenant.
            InvalidRequest: a bad list of models or time, or too many live keys.
        """
        narrowed = check_models(models)
        with self._changing() as connection:
            profile = _profile(self._live(connection, name))
            if narrowed is not None and not is_within(narrowed, profile.models):
                raise InvalidRequest("A key cannot open models its tenant may not use.", param="models")
            return self._make_key(
                connection, name, narrowed, None if lasts_s is None else check_seconds(lasts_s, "lasts_s")
            )

    def revoke_key(self, name: str, id: str) -> None:
        """Shut out one key. Raises NotFound."""
        with self._changing() as connection:
            self._live_key(connection, name, id)
            connection.execute(sql.update(self._keys).where(self._keys.c.id == id).values(revoked_at=self._wall()))

    def rotate_key(self, name: str, id: str, *, grace_s: object = DAY_S) -> NewKey:
        """A new key like the old one, which works for `grace_s` more seconds. Raises NotFound, InvalidRequest."""
        now = self._wall()
        with self._changing() as connection:
            old = self._live_key(connection, name, id)
            ends = now + check_seconds(grace_s, "grace_s", shortest=0.0)
            if old.expires_at is not None:
                ends = min(ends, old.expires_at)
            connection.execute(sql.update(self._keys).where(self._keys.c.id == id).values(expires_at=ends))
            lasts_s = None if old.expires_at is None else old.expires_at - old.created_at
            return self._make_key(connection, name, old.models, lasts_s)

    # -- within ---------------------------------------------------------------------------------------

    def _make_key(
        self, connection: sql.Connection, name: str, models: tuple[str, ...] | None, lasts_s: float | None
    ) -> NewKey:
        now = self._wall()
        mine = (self._keys.c.tenant == name) & self._keys.c.revoked_at.is_(None)
        live = sum(_info(row).is_live(now) for row in connection.execute(sql.select(self._keys).where(mine)))
        if live >= MAX_KEYS_PER_TENANT:
            raise InvalidRequest(f"A tenant may have {MAX_KEYS_PER_TENANT} live keys.", code="too_many_keys")
        secret, digest = new_key()
        expires_at = None if lasts_s is None else now + lasts_s
        info = KeyInfo(secrets.token_hex(8), name, models, now, expires_at, revoked_at=None)
        row = {**asdict(info), "models": None if models is None else json.dumps(models), "digest": digest}
        connection.execute(sql.insert(self._keys).values(row))
        return NewKey(secret, info)

    def _live(self, connection: sql.Connection, name: str) -> sql.Row[Any]:
        where = (self._tenants.c.name == name) & self._tenants.c.revoked_at.is_(None)
        row = connection.execute(sql.select(self._tenants).where(where)).one_or_none()
        if row is None:
            raise _no_tenant()
        return row

    def _live_key(self, connection: sql.Connection, name: str, id: str) -> KeyInfo:
        where = (self._keys.c.tenant == name) & (self._keys.c.id == id)
        row = connection.execute(sql.select(self._keys).where(where)).one_or_none()
        if row is None or not _info(row).is_live(self._wall()):
            raise NotFound("This tenant has no such live key.", code="key_not_found")
        return _info(row)

    @contextmanager
    def _changing(self) -> Iterator[sql.Connection]:
        """A transaction that raises the version; its row is the lock that puts changes one after the other."""
        with self._database.write() as connection:
            row = {"id": 1, "version": 1}
            self._database.add_to(connection, self._version, [row], key=("id",), sums=("version",))
            yield connection


def _profile(row: sql.Row[Any]) -> TenantProfile:
    changes = json.loads(row.profile)
    return TenantProfile(changes.pop("name")).changed(changes)


def _info(row: sql.Row[Any]) -> KeyInfo:
    models = None if row.models is None else tuple(json.loads(row.models))
    return KeyInfo(row.id, row.tenant, models, row.created_at, row.expires_at, row.revoked_at)


def _no_tenant() -> NotFound:
    return NotFound("There is no such tenant.", code="tenant_not_found")
