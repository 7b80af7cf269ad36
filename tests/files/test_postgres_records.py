"""Files and batches with their records in PostgreSQL instead of SQLite.

Runs where OMNILMM_POSTGRES_URL names a database that may be written to (postgresql://user:password@host/name); every
test works in a schema of its own, which it removes.
"""

from __future__ import annotations

import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql

sys.path.insert(0, str(Path(__file__).parents[1] / "batch"))
from batch_fakes import QUICK, Echo, HandClock, jsonl, line, results, submit, upload

from omnilmm.batch.desk import BatchDesk, WorkFolders
from omnilmm.batch.states import Status
from omnilmm.batch.store import BatchStore, LeaseLost
from omnilmm.batch.worker import BatchWorker
from omnilmm.database import Database
from omnilmm.errors import ContextLengthExceeded, Forbidden, InvalidRequest, NotFound
from omnilmm.files.store import FileStore, Purpose

SERVER = os.environ.get("OMNILMM_POSTGRES_URL", "")

pytestmark = pytest.mark.skipif(not SERVER, reason="OMNILMM_POSTGRES_URL names no PostgreSQL")


@pytest.fixture
def url():
    pytest.importorskip("psycopg")
    schema = "test_" + secrets.token_hex(8)
    server = sql.create_engine(sql.make_url(SERVER).set(drivername="postgresql+psycopg"))
    with server.begin() as connection:
        connection.execute(sql.text(f"CREATE SCHEMA {schema}"))
    yield f"{SERVER}{'&' if '?' in SERVER else '?'}options=-csearch_path%3D{schema}"
    with server.begin() as connection:
        connection.execute(sql.text(f"DROP SCHEMA {schema} CASCADE"))
    server.dispose()


@pytest.fixture
def clock():
    return HandClock()


def open_desk(url, root, clock, **options):
    database = Database(url)
    files = FileStore(database, root / "files", clock=clock, **options)
    return BatchDesk(BatchStore(database, clock=clock), files, WorkFolders(root / "batches"))


@pytest.fixture
def desk(url, tmp_path, clock):
    desk = open_desk(url, tmp_path, clock)
    yield desk
    desk.batches.check_integrity()
    desk.files.check_integrity()
    desk.files.database.close()


async def test_a_batch_from_beginning_to_end(desk, clock):
    batch = submit(desk, jsonl(line("a", "one"), line("b", "bad"), line("c", "three")))
    answerer = Echo(bad=ContextLengthExceeded("too long", param="messages"))
    assert await BatchWorker(desk, answerer, QUICK, clock=clock).run_one()
    done = desk.batches.get("acme", batch.id)
    assert (done.status, done.counts.completed, done.counts.failed) == (Status.COMPLETED, 2, 1)
    output, errors = results(desk, done)
    assert (set(output), set(errors)) == ({"a", "c"}, {"b"})


def test_only_one_of_many_gets_a_batch(desk, url, tmp_path, clock):
    for i in range(6):
        submit(desk, jsonl(line(f"{i}")))
    others = [open_desk(url, tmp_path, clock) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        claims = [*pool.map(lambda other: [other.batches.try_claim(30.0) for _ in range(6)], others)]
    taken = [claim.batch.id for mine in claims for claim in mine if claim is not None]
    assert len(taken) == len(set(taken))
    assert taken
    for other in others:
        other.files.database.close()


def test_a_zombie_changes_nothing(desk, clock):
    submit(desk, jsonl(line("a")))
    old = desk.batches.try_claim(30.0)
    clock.now += 31
    new = desk.batches.try_claim(30.0)
    assert new.token == old.token + 1
    for write in (lambda: desk.batches.renew(old, 30.0), lambda: desk.batches.seal(old, {})):
        with pytest.raises(LeaseLost):
            write()
    with pytest.raises(LeaseLost):
        desk.batches.advance(old, Status.FAILED)
    desk.batches.renew(new, 30.0)


def test_cancel_and_listing(desk):
    first, second = (submit(desk, jsonl(line("a"))) for _ in range(2))
    assert [batch.id for batch in desk.batches.list("acme").items] == [second.id, first.id]
    assert desk.batches.cancel("acme", first.id).status is Status.CANCELLING
    assert desk.batches.cancel_tenant("acme") == 1
    with pytest.raises(NotFound):
        desk.batches.get("other", first.id)
    with pytest.raises(InvalidRequest):
        desk.submit(
            "acme",
            endpoint="/v1/chat/completions",
            input_file_id=upload(desk, b"x", purpose=Purpose.USER_DATA),
            completion_window="24h",
        )
    for batch in (first, second):  # end what was begun, so that the books add up
        claim = desk.batches.try_claim(30.0)
        desk.batches.advance(claim, Status.CANCELLED)
        assert batch.id


def test_files(url, tmp_path, clock):
    desk = open_desk(url, tmp_path, clock, max_tenant_bytes=10)
    file_id = upload(desk, b"12345678")
    with desk.files.open("acme", file_id) as file:
        assert file.read() == b"12345678"
    with pytest.raises(Forbidden):
        upload(desk, b"123")
    with pytest.raises(NotFound):
        desk.files.get("other", file_id)
    desk.files.delete("acme", file_id)
    assert not desk.files.list("acme").items
    desk.files.database.close()
