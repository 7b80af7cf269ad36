"""Visits end when their key or tenant is revoked: while they wait, while their client does, and not by accident."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress

import pytest

from omnilmm.errors import ConfigError, Unauthorized
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Roster, new_key
from omnilmm.tenancy.tenant import Tenant

KEY, DIGEST = new_key()
ACME, OTHER = Tenant("acme", "acme"), Tenant("other", "other")
KNOWN = Roster(1, (KeyRecord(DIGEST, ACME, id="k1"),), {"acme": ACME, "other": OTHER}, had_keys=True)
KEY_REVOKED = Roster(2, (), {"acme": ACME, "other": OTHER}, had_keys=True)
TENANT_REVOKED = Roster(2, (), {"other": OTHER}, frozenset({"acme"}), had_keys=True)


@pytest.fixture
def book():
    book = KeyBook()
    book.learn(KNOWN)
    yield book
    book.presence.check_integrity()


def comes_in(book):
    return book.authenticate([f"Bearer {KEY}"], None)


class Work:
    """A stream of numbers that is waited for in front of each of them."""

    def __init__(self, book, tenant):
        self.book, self.tenant = book, tenant
        self.gates = [asyncio.Event() for _ in range(3)]
        self.waiting = asyncio.Semaphore(0)
        self.cleanings = 0

    async def run(self):
        with self.book.visit(self.tenant) as visit:
            try:
                for number, gate in enumerate(self.gates):
                    self.waiting.release()
                    await gate.wait()
                    visit.pause()
                    yield number
                    visit.resume()
            finally:
                await asyncio.sleep(0)  # cleaning up may wait too
                self.cleanings += 1


async def take_all(work):
    async with aclosing(work.run()) as stream:
        return [number async for number in stream]


@pytest.mark.parametrize("news", [KEY_REVOKED, TENANT_REVOKED])
async def test_a_visit_that_waits_is_ended(book, news):
    work = Work(book, comes_in(book))
    task = asyncio.create_task(take_all(work))
    await work.waiting.acquire()
    book.learn(news)
    with pytest.raises(Unauthorized, match="revoked"):
        await task
    assert work.cleanings == 1
    assert not task.cancelled()
    assert task.cancelling() == 0, "to the task nothing has happened"


async def test_a_visit_whose_client_has_the_word_is_told_when_it_comes_back(book):
    work = Work(book, comes_in(book))
    work.gates[0].set()
    stream = work.run()
    assert await anext(stream) == 0
    book.learn(KEY_REVOKED)
    with pytest.raises(Unauthorized):
        await anext(stream)
    assert work.cleanings == 1


async def test_a_stream_may_be_carried_on_by_another_task(book):
    work = Work(book, comes_in(book))
    work.gates[0].set()
    stream = work.run()
    assert await asyncio.create_task(anext(stream)) == 0
    second = asyncio.create_task(anext(stream))
    await work.waiting.acquire()
    await work.waiting.acquire()
    book.learn(KEY_REVOKED)
    with pytest.raises(Unauthorized):
        await second


async def test_others_and_expired_keys_stay(book):
    work, other = Work(book, comes_in(book)), Work(book, OTHER)
    tasks = [asyncio.create_task(take_all(each)) for each in (work, other)]
    for each in (work, other):
        await each.waiting.acquire()
    expired = Roster(2, (KeyRecord(DIGEST, ACME, id="k1", expires_at=1.0),), KNOWN.tenants, had_keys=True)
    book.learn(expired)
    with pytest.raises(Unauthorized):
        comes_in(book)
    for each in (work, other):
        for gate in each.gates:
            gate.set()
    assert await asyncio.gather(*tasks) == [[0, 1, 2]] * 2
    book.learn(TENANT_REVOKED)  # they have left


async def test_who_was_let_in_before_and_begins_after_is_refused(book):
    tenant = comes_in(book)
    book.learn(KEY_REVOKED)
    with pytest.raises(Unauthorized), book.visit(tenant):
        raise AssertionError("it began")


async def test_a_client_that_leaves_at_the_same_time_has_left(book):
    work = Work(book, comes_in(book))
    task = asyncio.create_task(take_all(work))
    await work.waiting.acquire()
    book.learn(KEY_REVOKED)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert work.cleanings == 1


async def test_a_timeout_around_a_visit_stays_a_timeout(book):
    work = Work(book, comes_in(book))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await take_all(work)


async def test_the_work_of_a_batch_ends_with_its_tenant_and_not_with_a_key(book):
    tenant = book.tenant("acme")
    work = Work(book, tenant)
    task = asyncio.create_task(take_all(work))
    await work.waiting.acquire()
    book.learn(KEY_REVOKED)
    await asyncio.sleep(0)
    assert not task.done()
    book.learn(TENANT_REVOKED)
    with pytest.raises(Unauthorized):
        await task


async def test_an_open_server_s_own_visitor_is_never_shown_out():
    book = KeyBook()
    with book.visit(book.authenticate([], "127.0.0.1")) as visit:
        book.learn(KNOWN)
        await asyncio.sleep(0)
        visit.resume()


def test_a_configuration_whose_models_are_no_models_is_refused():
    for models in (["*"], ["m:"], ["m*"]):
        with pytest.raises(ConfigError, match="MODEL"):
            KeyBook([KeyRecord(DIGEST, Tenant("acme", "acme", models=frozenset(models)))])
