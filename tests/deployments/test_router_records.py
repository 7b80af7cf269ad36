"""A router's records: it hears of changed tenants, and its receipts reach the disk."""

from __future__ import annotations

import asyncio
from datetime import date

import pytest
import sqlalchemy as sql

from deployments.records import Records, RosterWatch
from omnilmm.database import Database
from omnilmm.errors import ConfigError, Overloaded, Unauthorized
from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.idempotency import IdempotencyStore, SavedAnswer
from omnilmm.tenancy.keys import MAX_STALE_S, KeyBook, Roster
from omnilmm.tenancy.usage import Ledger, Receipt

DAY = date(2026, 11, 23)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/omnilmm.db"


@pytest.fixture
def operator(url):
    """The command line, in another process for all the router knows."""
    database = Database(url)
    yield Directory(database)
    database.close()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def opens(book, key):
    try:
        return book.authenticate([f"Bearer {key}"], "127.0.0.1").name == "acme"
    except Unauthorized:
        return False


async def test_a_router_hears_of_new_revoked_and_changed_tenants(operator):
    book = KeyBook()
    watch = RosterWatch(operator, book, every_s=0.002)
    await watch.start()
    assert book.is_open
    operator.add("acme", {})
    key = operator.add_key("acme")
    await until(lambda: not book.is_open and opens(book, key.secret))
    operator.change("acme", {"tokens_per_min": 5})
    header = [f"Bearer {key.secret}"]
    await until(lambda: book.authenticate(header, None).limits.tokens_per_min == 5)
    operator.revoke_key("acme", key.info.id)
    await until(lambda: not opens(book, key.secret))
    await watch.aclose()


async def test_a_directory_that_does_not_change_is_not_stale(operator):
    now = [0.0]
    book = KeyBook(clock=lambda: now[0])
    operator.add("acme", {})
    key = operator.add_key("acme").secret
    watch = RosterWatch(operator, book)
    await watch.refresh()
    for _ in range(2):
        now[0] += MAX_STALE_S
        assert opens(book, key)
        await watch.refresh()
    now[0] += MAX_STALE_S + 1
    with pytest.raises(Overloaded):
        opens(book, key)


async def test_a_watch_survives_an_outage(caplog):
    class Moody:
        is_ill = False
        num_asked = 0

        def version(self):
            self.num_asked += 1
            if self.is_ill:
                raise Overloaded("no disk", code="storage_unavailable")
            return 1

        def roster(self):
            return Roster(1, had_keys=True)

    directory, book = Moody(), KeyBook()
    watch = RosterWatch(directory, book, every_s=0.001)
    await watch.start()
    assert not book.is_open
    directory.is_ill = True
    seen = directory.num_asked
    await until(lambda: directory.num_asked > seen + 3)
    assert not book.is_open
    directory.is_ill = False
    seen = directory.num_asked
    await until(lambda: directory.num_asked > seen + 3)
    await watch.aclose()
    assert caplog.text.count("the last known ones are used") == 1


async def test_every_receipt_is_on_disk_when_a_router_has_closed(url):
    records = await Records.open(url, KeyBook())
    about = {"tenant": "acme", "key_id": "k", "model": "m", "status": 200, "request_id": "r"}
    for number in range(300):
        records.recorder.record(Receipt(at=1_795_435_200.0, prompt_tokens=number, **about))
    await records.aclose()
    database = Database(url)
    ledger = Ledger(database)
    ledger.check_integrity()
    (day,) = ledger.days(DAY, DAY)
    assert (day.sums["requests"], day.sums["prompt_tokens"]) == (300, sum(range(300)))
    database.close()


async def test_a_router_does_not_start_on_a_database_it_cannot_use(tmp_path):
    with pytest.raises(ConfigError):
        await Records.open("mysql://x", KeyBook())
    (tmp_path / "x.db").write_bytes(b"not a database" * 100)
    with pytest.raises(Overloaded):
        await Records.open(f"sqlite:///{tmp_path}/x.db", KeyBook())


async def test_old_claims_are_forgotten_again_and_again(url):
    records = await Records.open(url, KeyBook())
    rounds, failures = asyncio.Semaphore(0), [Overloaded("away"), ValueError("worse")]
    loop = asyncio.get_running_loop()

    def forget_old():
        loop.call_soon_threadsafe(rounds.release)
        if failures:
            raise failures.pop()

    records.idempotency.forget_old = forget_old
    tidying = asyncio.create_task(records.tidy_forever(every_s=0.001))
    async with asyncio.timeout(20):
        for _ in range(4):
            await rounds.acquire()
    tidying.cancel()
    await records.aclose()


async def test_a_router_begins_by_forgetting_old_claims(url):
    now = 1000.0
    database = Database(url)
    old = IdempotencyStore(database, wall=lambda: now)
    old.finish(old.begin("acme", "POST /v1/files", "k", "f" * 64), SavedAnswer(200, b"{}"))
    records = await Records.open(url, KeyBook())

    def num_left():
        with database.read() as connection:
            return connection.scalar(sql.text("select count(*) from idempotency"))

    await until(lambda: num_left() == 0)
    await records.aclose()
    database.close()
