"""Receipts on their way: batched, never lost while the process lives, bounded."""

from __future__ import annotations

import asyncio
import logging

import pytest

from omnilmm.errors import Overloaded
from omnilmm.tenancy import recorder as module
from omnilmm.tenancy.recorder import UsageRecorder
from omnilmm.tenancy.usage import Receipt


def receipt(number):
    return Receipt(0.0, "acme", "k", "m", 200, f"r{number}")


class FakeLedger:
    """Takes receipts when it is well, all or nothing."""

    def __init__(self):
        self.written = []
        self.batches = []
        self.is_ill = False
        self.open = asyncio.Event()
        self.open.set()
        self.called = asyncio.Event()

    async def write(self, receipts):
        self.called.set()
        await self.open.wait()
        if self.is_ill:
            raise Overloaded("no disk")
        self.batches.append(len(receipts))
        self.written += [one.request_id for one in receipts]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(module, "_RETRY_S", 0.001)


@pytest.fixture
def ledger():
    return FakeLedger()


def names(count):
    return [f"r{number}" for number in range(count)]


async def test_what_comes_together_is_written_together(ledger):
    recorder = UsageRecorder(ledger.write, interval_s=0.01)
    recorder.start()
    for number in range(2500):
        recorder.record(receipt(number))
    await recorder.aclose()
    assert ledger.written == names(2500)
    assert max(ledger.batches) == 1000
    assert recorder.num_waiting == 0


async def test_nothing_waits_longer_than_the_interval(ledger):
    recorder = UsageRecorder(ledger.write, interval_s=0.005)
    recorder.start()
    for number in range(3):
        ledger.called.clear()
        recorder.record(receipt(number))
        async with asyncio.timeout(10):
            await ledger.called.wait()
    await recorder.aclose()
    assert ledger.written == names(3)


async def test_an_ill_database_delays_and_loses_nothing(ledger, caplog):
    recorder = UsageRecorder(ledger.write, interval_s=0.001, max_waiting=5)
    recorder.start()
    ledger.is_ill = True
    for number in range(5):
        recorder.check_room()
        recorder.record(receipt(number))
    with pytest.raises(Overloaded) as caught:
        recorder.check_room()
    assert caught.value.code == "usage_backlog"
    recorder.record(receipt(5))  # a request that was let in before
    async with asyncio.timeout(10):
        await ledger.called.wait()
    ledger.is_ill = False
    await recorder.aclose()
    assert ledger.written == names(6)
    assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == 1  # said once, not at every try


async def test_a_receipt_that_comes_during_a_write_is_written_next(ledger):
    recorder = UsageRecorder(ledger.write, interval_s=0.001)
    recorder.start()
    ledger.open.clear()
    recorder.record(receipt(0))
    await ledger.called.wait()
    recorder.record(receipt(1))
    ledger.open.set()
    await recorder.aclose()
    assert ledger.written == names(2)


async def test_what_cannot_be_written_at_the_end_is_in_the_log(ledger, caplog):
    recorder = UsageRecorder(ledger.write, interval_s=0.001)
    recorder.start()
    ledger.is_ill = True
    recorder.record(receipt(7))
    await recorder.aclose(timeout_s=0.05)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(lines) == 1
    assert "'request_id': 'r7'" in lines[0]


async def test_closing_what_never_ran_is_harmless(ledger):
    await UsageRecorder(ledger.write).aclose()
    recorder = UsageRecorder(ledger.write)
    recorder.start()
    await recorder.aclose()
    assert ledger.written == []
