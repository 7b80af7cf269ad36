"""The one door to durable records: private, one writer at a time, and honest when it is shut."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError

from omnilmm.database import Database, tables
from omnilmm.errors import ConfigError, Overloaded


def things():
    return tables(("things", (sql.Column("name", sql.String(9), primary_key=True), sql.Column("n", sql.Integer))))


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/new/folder/records.db"


@pytest.fixture
def database(url):
    database = Database(url)
    database.require(things(), room="things", version=1)
    yield database
    database.close()


def rows(database):
    with database.read() as connection:
        return connection.execute(sql.text("SELECT name, n FROM things ORDER BY name")).all()


def test_the_file_is_ours_alone(database, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "records.db").stat().st_mode) == 0o600
    with database.write() as connection:
        connection.execute(sql.text("INSERT INTO things VALUES ('a', 1)"))
        for name in ("records.db-wal", "records.db-shm"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def test_writes_are_durable_and_enforced(database):
    with database.read() as connection:
        asked = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
        assert asked == {"journal_mode": "wal", "synchronous": 2}
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_block_that_raises_changes_nothing(database):
    def insert_and_fall():
        with database.write() as connection:
            connection.execute(sql.text("INSERT INTO things VALUES ('a', 1)"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        insert_and_fall()
    assert rows(database) == []


def test_a_reader_sees_one_moment_and_waits_for_nobody(database):
    with database.write() as connection:
        connection.execute(sql.text("INSERT INTO things VALUES ('a', 1)"))
    with database.read() as reader:
        assert reader.execute(sql.text("SELECT count(*) FROM things")).scalar() == 1
        with database.write() as writer:
            writer.execute(sql.text("INSERT INTO things VALUES ('b', 1)"))
        assert reader.execute(sql.text("SELECT count(*) FROM things")).scalar() == 1
    assert len(rows(database)) == 2


def test_rows_that_exist_are_left_or_added_to(database):
    table = things().tables["things"]
    with database.write() as connection:
        database.insert_new(connection, table, [{"name": "a", "n": 1}], key=("name",))
        database.insert_new(connection, table, [{"name": "a", "n": 9}, {"name": "b", "n": 2}], key=("name",))
        database.add_to(connection, table, [{"name": "b", "n": 5}, {"name": "c", "n": 7}], key=("name",), sums=("n",))
        database.insert_new(connection, table, [], key=("name",))
        database.add_to(connection, table, [], key=("name",), sums=("n",))
    assert rows(database) == [("a", 1), ("b", 7), ("c", 7)]


def test_a_broken_constraint_is_the_caller_s_matter(database):
    with database.write() as connection:
        connection.execute(sql.text("INSERT INTO things VALUES ('a', 1)"))
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(sql.text("INSERT INTO things VALUES ('a', 1)"))


def test_any_other_trouble_is_a_503_that_says_nothing(database, tmp_path):
    with pytest.raises(Overloaded) as caught, database.write() as connection:
        connection.execute(sql.text("INSERT INTO nowhere VALUES (1)"))
    assert caught.value.code == "storage_unavailable"
    assert "nowhere" not in caught.value.message
    (tmp_path / "new" / "folder" / "broken.db").write_bytes(b"not a database" * 100)
    broken = Database(f"sqlite:///{tmp_path}/new/folder/broken.db")
    with pytest.raises(Overloaded):
        broken.require(things(), room="things", version=1)
    broken.close()


def test_tables_of_another_version_are_refused(database, url):
    again = Database(url)
    again.require(things(), room="things", version=1)
    with pytest.raises(ConfigError, match="version 1; this program works with 2"):
        again.require(things(), room="things", version=2)
    again.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "sqlite://",
        "sqlite:///relative.db",
        "sqlite:///:memory:",
        "mysql://h/d",
        "sqlite+aiosqlite:////a",
    ],
)
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match=r"^database: "):
        Database(url)


def test_a_path_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be opened"):
        Database(f"sqlite:///{tmp_path}/file/records.db")


def test_a_password_is_in_no_message():
    with pytest.raises(ConfigError) as caught:
        Database("mysql://someone:secret@host/name")
    assert "secret" not in caught.value.message


def test_a_write_is_alone_from_its_beginning(database, tmp_path):
    """Or one of two that read before they write would find out at its end that it came too late."""
    with sqlite3.connect(tmp_path / "new" / "folder" / "records.db", timeout=0, isolation_level=None) as other:
        with database.read():
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        with database.write(), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.close()


COUNTER = """
import sys
import sqlalchemy as sql
from omnilmm.database import Database, tables
database = Database(sys.argv[1])
things = tables(("things", (sql.Column("name", sql.String(9), primary_key=True), sql.Column("n", sql.Integer))))
database.require(things, room="things", version=1)
for _ in range(40):
    with database.write() as connection:
        n = connection.execute(sql.text("SELECT n FROM things WHERE name = 'n'")).scalar()
        if n is None:
            connection.execute(sql.text("INSERT INTO things VALUES ('n', 1)"))
        else:
            connection.execute(sql.text("UPDATE things SET n = :n"), {"n": n + 1})
database.close()
"""


def test_processes_that_read_and_write_take_turns(url):
    """Made by all of them at once, and none loses another's step."""
    root = Path(__file__).parents[1]
    workers = [subprocess.Popen([sys.executable, "-c", COUNTER, url], cwd=root) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    database = Database(url)
    assert rows(database) == [("n", 120)]
    database.close()
