"""The ledger: exact whatever happens, and told by day."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omnilmm.database import Database
from omnilmm.errors import InvalidRequest
from omnilmm.messages import ImageSource, ImageUsage, Usage
from omnilmm.tenancy.usage import SUMS, Ledger, Receipt, to_csv

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()
DAY = date(2026, 11, 23)
ALL = (date(2026, 1, 1), date(2027, 1, 1))


@pytest.fixture
def ledger(database):
    return Ledger(database)


def receipt(**changes):
    about = {"at": NOON, "tenant": "acme", "key_id": "k1", "model": "m", "status": 200, "request_id": "r"}
    return Receipt(**{**about, "prompt_tokens": 10, "completion_tokens": 3, "encode_us": 7, **changes})


def test_a_receipt_says_all_that_was_taken():
    images = [ImageUsage(source, 64) for source in (*ImageSource, ImageSource.CACHE)]
    usage = Usage(100, 20, 30, 64, tuple(images), encode_s=0.25, decode_s=1.0000004, embedding_bytes=512)
    made = Receipt.of(usage, at=NOON, tenant="acme", key_id="k", model="m", status=200, request_id="r", batch_id="b")
    assert {**asdict(made), "id": ""} == {
        **asdict(receipt(key_id="k", batch_id="b", prompt_tokens=100, completion_tokens=20, cached_tokens=30)),
        "id": "",
        "image_tokens": 64,
        "images_encoded": 1,
        "images_cache": 2,
        "images_flight": 1,
        "images_kv": 1,
        "encode_us": 250_000,
        "decode_us": 1_000_000,
        "embedding_bytes": 512,
    }
    failed = Receipt.of(None, at=NOON, tenant="acme", key_id="k", model="m", status=503, request_id="r")
    assert failed.amounts() == {**dict.fromkeys(SUMS, 0), "requests": 1, "failed_requests": 1}


def test_days_add_up_by_tenant_model_and_adapter(ledger):
    late, early = NOON + 12 * 3600 - 0.001, NOON + 12 * 3600
    ledger.write([receipt(), receipt(at=late, status=499), receipt(at=early), receipt(tenant="b", adapter="x")])
    ledger.write([receipt(prompt_tokens=2**40)])
    days = ledger.days(*ALL)
    assert [(day.day, day.tenant, day.adapter) for day in days] == [
        ("2026-11-23", "acme", ""),
        ("2026-11-23", "b", "x"),
        ("2026-11-24", "acme", ""),
    ]
    assert days[0].sums["requests"] == 3
    assert days[0].sums["failed_requests"] == 1
    assert days[0].sums["prompt_tokens"] == 2**40 + 20
    assert [day.tenant for day in ledger.days(DAY, DAY, tenant="b")] == ["b"]
    assert ledger.days(date(2026, 11, 25), date(2026, 12, 1)) == []
    ledger.check_integrity()


RECEIPTS = st.builds(
    receipt,
    at=st.sampled_from([NOON, NOON + 86_400, NOON - 86_400]),
    tenant=st.sampled_from(["a", "b"]),
    model=st.sampled_from(["m", "n"]),
    status=st.sampled_from([200, 400, 499, 503]),
    prompt_tokens=st.integers(0, 2**40),
    images_kv=st.integers(0, 16),
    id=st.sampled_from([f"{i:032x}" for i in range(12)]),  # some are written twice
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(RECEIPTS, max_size=6), max_size=6))
def test_sums_of_receipts_equal_the_days(tmp_path, writes):
    path = tmp_path / "fresh.db"
    path.unlink(missing_ok=True)
    database = Database(f"sqlite:///{path}")
    ledger = Ledger(database)
    kept = {}
    for batch in writes:
        ledger.write(batch)
        now = {written.id: written for written in batch}
        kept = {**now, **kept}  # who came first stays
        ledger.check_integrity()
    assert {written.id: written for written in ledger.receipts(*ALL)} == kept
    days = ledger.days(*ALL)
    for name in SUMS:
        assert sum(day.sums[name] for day in days) == sum(written.amounts()[name] for written in kept.values())
    database.close()
    for left in tmp_path.glob("fresh.db*"):
        left.unlink()


def test_integrity_is_really_checked(ledger, database):
    ledger.write([receipt()])
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE usage_days SET prompt_tokens = prompt_tokens + 1")
    with pytest.raises(AssertionError):
        ledger.check_integrity()


def test_a_failed_write_leaves_nothing_and_can_be_repeated(ledger, database):
    whole = [receipt() for _ in range(1200)]
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE usage_days RENAME TO away")
    with pytest.raises(Exception, match="records"):
        ledger.write(whole)
    assert ledger.receipts(*ALL) == []
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO usage_days")
    ledger.write(whole)
    ledger.write(whole)  # as after a commit whose answer was lost
    assert ledger.days(*ALL)[0].sums["requests"] == 1200
    ledger.check_integrity()


def test_receipts_are_listed_a_page_at_a_time(ledger):
    written = [receipt(tenant=name) for name in "ababa"]
    ledger.write(written)
    first = ledger.receipts(*ALL, tenant="a", limit=2)
    rest = ledger.receipts(*ALL, tenant="a", after=first[-1].id, limit=2)
    assert [one.id for one in first + rest] == sorted(one.id for one in written if one.tenant == "a")


def test_old_receipts_go_and_their_sums_stay(ledger):
    ledger.write([receipt(), receipt(at=NOON + 86_400)])
    before = ledger.days(*ALL)
    assert ledger.forget_receipts(date(2026, 11, 24)) == 1
    assert len(ledger.receipts(*ALL)) == 1
    assert ledger.days(*ALL) == before
    ledger.check_integrity()


def test_words_nobody_foresaw_cannot_hold_up_the_others(ledger):
    ledger.write([receipt(model="\0" + "x" * 1000), receipt()])
    assert {one.model for one in ledger.receipts(*ALL)} == {"x" * 160, "m"}
    ledger.check_integrity()


def test_csv_says_the_same(ledger):
    ledger.write([receipt(), receipt(tenant="b")])
    days = ledger.days(*ALL)
    read = list(csv.DictReader(io.StringIO(to_csv(days))))
    assert read == [{name: str(value) for name, value in day.document().items()} for day in days]
    assert to_csv([]).startswith("day,tenant,model,adapter,requests,")


@pytest.mark.parametrize("last", [date(2026, 11, 22), date(2046, 1, 1)])
def test_a_span_is_a_span(ledger, last):
    with pytest.raises(InvalidRequest):
        ledger.days(DAY, last)


WRITER = """
import sys
from omnilmm.database import Database
from omnilmm.tenancy.usage import Ledger, Receipt
database = Database(sys.argv[1])
ledger = Ledger(database)
for i in range(25):
    about = dict(at=1795435200.0 + i % 2 * 86400, tenant="ab"[i % 2], key_id="k", model="m", status=200, request_id="r")
    ledger.write([Receipt(prompt_tokens=n, **about) for n in range(4)])
    print(i, flush=True)
database.close()
"""


def test_writers_in_several_processes_and_one_that_is_killed(database_url):
    """Three write to the end; one is killed in the middle of its work. Every transaction is whole or not there."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WRITER, database_url]
    doomed = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert doomed.stdout is not None
    told = [doomed.stdout.readline() for _ in range(5)]
    doomed.kill()
    told += doomed.stdout.readlines()
    doomed.wait()
    doomed.stdout.close()
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    database = Database(database_url)
    ledger = Ledger(database)
    ledger.check_integrity()
    num_requests = sum(day.sums["requests"] for day in ledger.days(*ALL))
    assert num_requests % 4 == 0
    said = len([line for line in told if line.strip()])
    assert 300 + 4 * said <= num_requests <= 300 + 4 * said + 4
    database.close()


def test_a_receipt_keeps_its_name():
    one = receipt()
    assert replace(one, status=500).id == one.id
    assert receipt().id != one.id
