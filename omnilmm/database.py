"""One door to durable records: a SQLAlchemy engine over a SQLite file (the default) or PostgreSQL.

Rooms that keep records describe their tables, hand them to `Database.require` and use `read` and `write`. All calls
block: servers make them away from the event loop. Nothing here knows what anybody stores.

SQLite runs in WAL mode, so readers never wait for the writer, and every commit reaches the disk before `write` returns
(synchronous=FULL). A write takes the file's one write lock at its beginning (BEGIN IMMEDIATE): two processes that read
and then write wait for each other and never fail half-way. WAL needs shared memory: the file must be on a disk of this
machine, not on a network folder.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.schema import SchemaItem

from omnilmm.errors import ConfigError, Overloaded

_BUSY_S: Final = 15.0
"""How long a SQLite writer waits for another process's transaction."""
_WRITES: Final = "omnilmm_writes"
_SCHEMA_LOCK: Final = 0x6F6D6E69  # "omni": the advisory lock under which PostgreSQL tables are made
_POSTGRES: Final = "postgresql+psycopg"


class Database:
    """Transactions on one database. Thread-safe; a process that forks must open its own.

    Args:
        url: ``sqlite:////absolute/path.db``, or ``postgresql://user:password@host/name``, which needs psycopg 3
            (``pip install 'omnilmm-serve[postgres]'``). A SQLite file that does not exist is made, readable by this
            user only, with its folder.

    Raises:
        ConfigError: the URL is of another kind, the path is relative, or the driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self._url = _parse(url)
        self.is_sqlite: Final = self._url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            _make_private_file(Path(self._url.database or ""))
        self._reads: Mapping[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._engine = _open_sqlite(self._url) if self.is_sqlite else _open_postgres(self._url)

    def require(self, metadata: MetaData, *, room: str, version: int) -> None:
        """Make the tables of `room` if they are missing. May be called by many processes at once.

        Raises:
            ConfigError: the tables in the database are of another version.
            Overloaded: the database cannot be reached.
        """
        versions = _versions()
        with self.write() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
            versions.metadata.create_all(connection)
            found = connection.scalar(select(versions.c.version).where(versions.c.room == room))
            if found is not None and found != version:
                raise ConfigError(
                    f"the database holds the {room} tables in version {found}; this program works with {version}"
                )
            metadata.create_all(connection)
            if found is None:
                connection.execute(insert(versions).values(room=room, version=version))

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and changes nothing.

        Raises:
            Overloaded: `storage_unavailable`, the database cannot be reached.
        """
        with _our_errors(), self._engine.connect() as connection:
            reading = connection.execution_options(**self._reads)
            with reading.begin():
                yield reading

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed, durably, when the block ends, and undone when it raises.

        Raises:
            Overloaded: `storage_unavailable`, the database cannot be reached, is full, or busy for too long. If the
                commit itself failed on PostgreSQL it may have taken effect: write what can be written twice.
            IntegrityError: SQLAlchemy's, when a constraint of the tables is broken.
        """
        with _our_errors(), self._engine.connect() as connection:
            writing = connection.execution_options(**{_WRITES: True})
            with writing.begin():
                yield writing

    def insert_new(
        self, connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *, key: Sequence[str]
    ) -> None:
        """Insert `rows`; those whose `key` columns are already there are left as they are."""
        if rows:
            new = sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)
            connection.execute(new.on_conflict_do_nothing(index_elements=[*key]), [*map(dict, rows)])

    def add_to(
        self,
        connection: Connection,
        table: Table,
        rows: Sequence[Mapping[str, Any]],
        *,
        key: Sequence[str],
        sums: Sequence[str],
    ) -> None:
        """Insert `rows`; where a row with the same `key` columns exists, its `sums` columns grow instead."""
        if not rows:
            return
        new = sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)
        grown = {name: table.c[name] + new.excluded[name] for name in sums}
        connection.execute(new.on_conflict_do_update(index_elements=[*key], set_=grown), [*map(dict, rows)])

    def close(self) -> None:
        """Close all connections. Blocks of `read` and `write` must have ended."""
        self._engine.dispose()


def tables(*described: tuple[str, Sequence[SchemaItem]]) -> MetaData:
    """A fresh MetaData with these tables: (name, columns and constraints). Metadata can change, so nobody shares it."""
    metadata = MetaData()
    for name, items in described:
        Table(name, metadata, *items)
    return metadata


def _versions() -> Table:
    columns = (Column("room", String(64), primary_key=True), Column("version", Integer, nullable=False))
    return tables(("schema_versions", columns)).tables["schema_versions"]


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError("database: expected sqlite:////path or postgresql://user:password@host/name") from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername=_POSTGRES)
    if parsed.drivername not in ("sqlite", _POSTGRES):
        raise ConfigError("database: only sqlite:// and postgresql:// URLs are known")
    if parsed.drivername == "sqlite" and (not parsed.database or not Path(parsed.database).is_absolute()):
        raise ConfigError("database: sqlite:// needs an absolute path (four slashes)")
    return parsed


def _make_private_file(path: Path) -> None:
    """Made by us, not by SQLite, so that it is never readable by others, not even for a moment."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigError(f"database: {path} cannot be opened: {error.strerror}") from None


def _open_sqlite(url: URL) -> Engine:
    # Autocommit is the driver's off switch: transactions are begun below, on our terms.
    engine = create_engine(url, connect_args={"timeout": _BUSY_S, "isolation_level": None})

    def prepare(connection: sqlite3.Connection, entry: ConnectionPoolEntry) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    return engine


def _open_postgres(url: URL) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True, pool_size=4, connect_args={"connect_timeout": 5})
    except (ImportError, NoSuchModuleError):
        raise ConfigError("database: PostgreSQL needs psycopg; pip install 'omnilmm-serve[postgres]'") from None


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, PoolTimeoutError) as error:
        raise Overloaded(
            "The server's records cannot be reached right now.", code="storage_unavailable", retry_after=1
        ) from error
