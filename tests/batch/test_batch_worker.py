"""Batches from submission to their end: rows B03 to B09, F19, F25 of the catalogues, without HTTP."""

import asyncio
import errno
import json
import os

import pytest
from batch_fakes import QUICK, Echo, HandClock, Stuck, jsonl, line, make_desk, results, soon, submit, upload

from omnilmm.batch.job import Job, WorkRules
from omnilmm.batch.states import NEXT, Counts, Status
from omnilmm.batch.store import LeaseLost
from omnilmm.batch.worker import BatchWorker
from omnilmm.errors import ContextLengthExceeded, InvalidRequest, NotFound, Overloaded, RateLimited, ReplicaLost
from omnilmm.files.store import Purpose


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def desk(tmp_path, clock):
    desk = make_desk(tmp_path, clock)
    yield desk
    desk.batches.check_integrity()
    desk.files.check_integrity()


def worker(desk, answerer, clock, rules=QUICK, sleep=soon):
    return BatchWorker(desk, answerer, rules, clock=clock, sleep=sleep)


async def finish(desk, batch, answerer, clock, **options):
    while await worker(desk, answerer, clock, **options).run_one():
        pass
    return desk.batches.get(batch.tenant, batch.id)


async def until(condition):
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to be")


async def test_a_batch_from_beginning_to_end(desk, clock):
    batch = submit(desk, jsonl(*(line(f"r{i}", f"text {i}") for i in range(10))))
    assert batch.status is Status.VALIDATING
    done = await finish(desk, batch, Echo(), clock)
    assert (done.status, done.counts, done.model) == (Status.COMPLETED, Counts(10, 10, 0), "m")
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    assert done.error_file_id is None
    output, errors = results(desk, done)
    assert not errors
    assert list(output) == [f"r{i}" for i in range(10)]  # in the order of the input
    answer = output["r3"]["response"]
    assert answer["status_code"] == 200
    assert answer["body"]["choices"][0]["message"]["content"] == "text 3"
    assert (done.usage.input_tokens, done.usage.output_tokens) == (30, 20)
    assert not desk.folders.path(batch.id).exists()
    stored = desk.files.get("acme", done.output_file_id)
    assert (stored.purpose, stored.filename) == (Purpose.BATCH_OUTPUT, f"{batch.id}_output.jsonl")


async def test_bad_content_fails_the_batch_and_runs_nothing(desk, clock):
    answerer = Echo()
    batch = submit(desk, jsonl(line("a"), line("a")) + b"{\n")
    done = await finish(desk, batch, answerer, clock)
    assert done.status is Status.FAILED
    assert [(e.code, e.line) for e in done.errors] == [("duplicate_custom_id", 2), ("invalid_json_line", 3)]
    assert answerer.asked == []
    assert (done.output_file_id, done.error_file_id) == (None, None)


async def test_only_so_many_faults_are_listed(desk, clock):
    done = await finish(desk, submit(desk, b"{\n" * 1000), Echo(), clock)
    assert len(done.errors) == 100


async def test_an_unknown_model_fails_the_batch(desk, clock):
    entry = line("a")
    entry["body"]["model"] = "other"
    done = await finish(desk, submit(desk, jsonl(entry)), Echo(), clock)
    assert [(e.code, e.param) for e in done.errors] == [("model_not_found", "body.model")]


async def test_some_lines_fail(desk, clock):
    streamed = line("c", "stream")
    streamed["body"]["stream"] = True
    answerer = Echo(bad=ContextLengthExceeded("too long", param="messages"), odd=RuntimeError("secret"))
    batch = submit(desk, jsonl(line("a", "good"), line("b", "bad"), streamed, line("d", "odd")))
    done = await finish(desk, batch, answerer, clock)
    assert (done.status, done.counts) == (Status.COMPLETED, Counts(4, 1, 3))
    output, errors = results(desk, done)
    assert list(output) == ["a"]
    told = {name: (e["response"]["status_code"], e["response"]["body"]["error"]["code"]) for name, e in errors.items()}
    assert told == {
        "b": (400, "context_length_exceeded"),
        "c": (400, "unsupported_value"),
        "d": (500, "internal_error"),
    }
    assert "secret" not in json.dumps(errors)


async def test_all_lines_fail(desk, clock):
    done = await finish(
        desk, submit(desk, jsonl(line("a", "bad"), line("b", "bad"))), Echo(bad=InvalidRequest("no")), clock
    )
    assert (done.status, done.counts, done.output_file_id) == (Status.COMPLETED, Counts(2, 0, 2), None)
    assert set(results(desk, done)[1]) == {"a", "b"}


async def test_no_room_is_waited_for_and_lost_replicas_are_tried_thrice(desk, clock):
    answerer = Echo(
        full=[Overloaded("full", retry_after=1)] * 20 + [RateLimited("slow down")] * 5,
        lost=[ReplicaLost("lost")] * 2,
        poison=ReplicaLost("lost"),
    )
    batch = submit(desk, jsonl(line("a", "full"), line("b", "lost"), line("c", "poison"), line("d", "fine")))
    done = await finish(desk, batch, answerer, clock)
    output, errors = results(desk, done)
    assert set(output) == {"a", "b", "d"}
    assert errors["c"]["response"]["status_code"] == 503
    assert answerer.asked.count("poison") == 3


async def test_so_many_at_a_time_and_pictures_together(desk, clock):
    def about(picture, text):
        parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    answerer = Echo()
    lines = [line(f"{i}", body={"model": "m", "messages": about("ABC"[i % 3], f"{i % 3}")}) for i in range(30)]
    done = await finish(desk, submit(desk, jsonl(*lines)), answerer, clock)
    assert done.counts.completed == 30
    assert answerer.most_running == QUICK.max_running
    assert answerer.asked == sorted(answerer.asked)


# -- cancelling and expiring --------------------------------------------------------------------------


async def test_cancel_while_running_keeps_what_is_finished(desk, clock):
    answerer = Stuck(5)
    batch = submit(desk, jsonl(*(line(f"r{i:02}", f"{i:02}") for i in range(20))))
    working = asyncio.ensure_future(worker(desk, answerer, clock).run_one())
    await until(answerer.is_stuck)
    assert desk.batches.cancel("acme", batch.id).status is Status.CANCELLING
    assert desk.batches.cancel("acme", batch.id).status is Status.CANCELLING  # twice is once
    await working
    done = desk.batches.get("acme", batch.id)
    assert done.status is Status.CANCELLED
    output, errors = results(desk, done)
    assert len(output) == done.counts.completed == 5
    assert len(errors) == done.counts.failed == 15
    assert {entry["error"]["code"] for entry in errors.values()} == {"batch_cancelled"}
    assert answerer.running == 0
    assert desk.batches.cancel("acme", batch.id) == done  # and afterwards too


async def test_cancel_before_anything_began(desk, clock):
    batch = submit(desk, jsonl(line("a")))
    desk.batches.cancel("acme", batch.id)
    answerer = Echo()
    done = await finish(desk, batch, answerer, clock)
    assert (done.status, done.output_file_id, done.error_file_id) == (Status.CANCELLED, None, None)
    assert answerer.asked == []


async def test_what_has_ended_cannot_be_cancelled(desk, clock):
    done = await finish(desk, submit(desk, jsonl(line("a"))), Echo(), clock)
    with pytest.raises(InvalidRequest) as caught:
        desk.batches.cancel("acme", done.id)
    assert caught.value.code == "batch_not_cancellable"
    assert desk.batches.get("acme", done.id) == done


@pytest.mark.parametrize("moment", ["begin", "finalise"])
async def test_a_wish_to_cancel_between_two_steps(desk, clock, moment, monkeypatch):
    batch = submit(desk, jsonl(line("a")))
    wanted = {"begin": Status.IN_PROGRESS, "finalise": Status.FINALIZING}[moment]
    real = desk.batches.advance

    def advance(claim, status, **changes):
        if status is wanted:
            desk.batches.cancel("acme", batch.id)
        return real(claim, status, **changes)

    monkeypatch.setattr(desk.batches, "advance", advance)
    done = await finish(desk, batch, Echo(), clock)
    assert done.status is Status.CANCELLED
    assert len(results(desk, done)[0]) == (moment == "finalise")


async def test_the_window_ends(desk, clock):
    answerer = Stuck(5)
    batch = submit(desk, jsonl(*(line(f"r{i:02}", f"{i:02}") for i in range(20))))
    waiting = asyncio.Event()

    async def sleep(seconds):
        if seconds == QUICK.renew_every_s:
            await waiting.wait()
        await asyncio.sleep(0)

    working = asyncio.ensure_future(worker(desk, answerer, clock, sleep=sleep).run_one())
    await until(answerer.is_stuck)
    clock.now += 24 * 3600 + 1
    waiting.set()
    await working
    done = desk.batches.get("acme", batch.id)
    assert done.status is Status.EXPIRED
    output, errors = results(desk, done)
    assert (len(output), len(errors)) == (5, 15)
    assert {entry["error"]["code"] for entry in errors.values()} == {"batch_expired"}


async def test_a_window_that_ended_before_validation(desk, clock):
    batch = submit(desk, jsonl(line("a")))
    clock.now += 24 * 3600 + 1
    assert (await finish(desk, batch, Echo(), clock)).status is Status.EXPIRED


async def test_the_input_may_be_deleted_at_once(desk, clock):
    file_id = upload(desk, jsonl(line("a")))
    first = desk.submit("acme", endpoint="/v1/chat/completions", input_file_id=file_id, completion_window="24h")
    second = desk.submit("acme", endpoint="/v1/chat/completions", input_file_id=file_id, completion_window="24h")
    desk.files.delete("acme", file_id)
    await finish(desk, first, Echo(), clock)
    for batch in (first, second):
        assert desk.batches.get("acme", batch.id).status is Status.COMPLETED


async def test_inputs_that_are_none(desk):
    picture, deleted, foreign = (
        upload(desk, b"{}", purpose=Purpose.VISION),
        upload(desk, b"{}"),
        upload(desk, b"{}", tenant="other"),
    )
    desk.files.delete("acme", deleted)
    ask = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    with pytest.raises(InvalidRequest) as caught:
        desk.submit("acme", input_file_id=picture, **ask)
    assert (caught.value.code, caught.value.param) == ("invalid_file_purpose", "input_file_id")
    told = set()
    for file_id in (deleted, foreign, "file-nothing"):
        with pytest.raises(NotFound) as missing:
            desk.submit("acme", input_file_id=file_id, **ask)
        told.add(json.dumps(missing.value.body()))
    assert len(told) == 1


# -- who works on what --------------------------------------------------------------------------------


async def test_a_zombie_changes_nothing(desk, clock):
    """It is stopped in the middle, its lease runs out, another takes over and finishes; then it wakes up."""
    answerer = Stuck(5)
    batch = submit(desk, jsonl(*(line(f"r{i:02}", f"{i:02}") for i in range(12))))
    claim = desk.batches.try_claim(QUICK.lease_s)
    frozen = asyncio.Event()

    async def never(seconds):
        await frozen.wait()

    zombie = asyncio.ensure_future(Job(desk, claim, answerer, QUICK, clock=clock, sleep=never).run())
    await until(answerer.is_stuck)
    assert desk.batches.try_claim(QUICK.lease_s) is None
    clock.now += QUICK.lease_s + 1
    other = Stuck(3)
    working = asyncio.ensure_future(worker(desk, other, clock).run_one())
    await until(other.is_stuck)
    answerer.gate.set()  # the zombie goes on and answers everything a second time
    with pytest.raises(LeaseLost):
        await zombie
    assert desk.batches.get("acme", batch.id).status is Status.IN_PROGRESS
    other.gate.set()
    await working
    done = desk.batches.get("acme", batch.id)
    assert (done.status, done.counts) == (Status.COMPLETED, Counts(12, 12, 0))
    output, _ = results(desk, done)
    assert len(output) == 12
    assert len(other.asked) == 7  # what the first had finished before it froze was not asked again
    assert len(desk.files.list("acme").items) == 2  # the input and one output: nothing of the zombie's


async def test_a_worker_that_cannot_renew_gives_up(desk, clock, monkeypatch):
    submit(desk, jsonl(line("a", "x")))
    answerer = Stuck(0)
    claim = desk.batches.try_claim(QUICK.lease_s)

    def renew(*args):
        clock.now += 6
        raise Overloaded("the database is away")

    monkeypatch.setattr(desk.batches, "renew", renew)
    with pytest.raises(LeaseLost):
        await Job(desk, claim, answerer, QUICK, clock=clock, sleep=soon).run()
    assert answerer.running == 0


async def test_tenants_take_turns(desk, clock):
    first = [submit(desk, jsonl(line("a")), tenant="greedy") for _ in range(3)]
    second = submit(desk, jsonl(line("a")), tenant="modest")
    claims = [desk.batches.try_claim(30.0).batch.id for _ in range(4)]
    assert claims == [first[0].id, second.id, first[1].id, first[2].id]
    assert desk.batches.try_claim(30.0) is None


async def test_the_worker_gives_back_what_it_had_in_work(desk, clock):
    batches = [submit(desk, jsonl(line("a", "x")), tenant=f"t{i}") for i in range(3)]
    answerer = Stuck(0)
    working = asyncio.ensure_future(BatchWorker(desk, answerer, QUICK, max_batches=2, clock=clock, sleep=soon).run())
    await until(lambda: answerer.running == 2)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert answerer.running == 0
    assert {desk.batches.try_claim(30.0).batch.id for _ in batches} == {batch.id for batch in batches}


async def test_the_worker_finds_new_work(desk, clock):
    working = asyncio.ensure_future(worker(desk, Echo(), clock).run())
    for _ in range(3):
        batch = submit(desk, jsonl(line("a")))
        await until(lambda b=batch: desk.batches.get("acme", b.id).status is Status.COMPLETED)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working


# -- a full disk --------------------------------------------------------------------------------------


async def test_a_disk_that_is_full_for_a_while(desk, clock, monkeypatch):
    """Every write fails from the third line on, until four lines wait for room; nothing is answered twice."""
    answerer = Echo()
    batch = submit(desk, jsonl(*(line(f"r{i}", f"{i}") for i in range(10))))
    real, refused = os.write, []

    def write(descriptor, data):
        if len(answerer.asked) >= 3 and len(refused) < 50:
            refused.append(1)
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    done = await finish(desk, batch, answerer, clock)
    assert refused
    assert (done.status, done.counts) == (Status.COMPLETED, Counts(10, 10, 0))
    assert len(answerer.asked) == 10
    assert len(results(desk, done)[0]) == 10


async def test_a_disk_that_is_full_while_the_files_are_written(desk, clock, monkeypatch):
    batch = submit(desk, jsonl(line("a")))
    real = os.fsync

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "full")

    answerer = Echo()
    with monkeypatch.context() as patch:
        patch.setattr(desk.files.blobs, "commit", lambda *args: os.fsync(-1))
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="full"):
            os.fsync(-1)
    monkeypatch.setattr("omnilmm.files.blobs.os.fsync", fsync)
    await worker(desk, answerer, clock).run_one()
    waiting = desk.batches.get("acme", batch.id)
    assert waiting.output_file_id is None
    assert not waiting.status.is_final
    monkeypatch.setattr("omnilmm.files.blobs.os.fsync", real)
    assert desk.batches.try_claim(30.0) is None  # not at once
    clock.now += 61
    done = await finish(desk, batch, answerer, clock)
    assert done.status is Status.COMPLETED
    assert list(results(desk, done)[0]) == ["a"]


# -- tidiness -----------------------------------------------------------------------------------------


def test_every_state_can_be_left_or_is_an_end():
    assert {status for status in Status if status.is_final} == {
        Status.COMPLETED,
        Status.FAILED,
        Status.EXPIRED,
        Status.CANCELLED,
    }
    reachable, waiting = set(), [Status.VALIDATING]
    while waiting:
        status = waiting.pop()
        reachable.add(status)
        waiting += NEXT[status] - reachable
    assert reachable == set(Status)


async def test_what_a_crash_leaves_is_swept(desk, clock):
    batch = submit(desk, jsonl(line("a")))
    orphan = desk.folders.create("batch_orphan")
    os.utime(orphan, (0, 0))
    os.utime(desk.folders.path(batch.id), (0, 0))
    assert desk.sweep() == 1
    assert desk.folders.path(batch.id).exists()
    assert not orphan.exists()


async def test_listing(desk, clock):
    ids = [submit(desk, jsonl(line("a"))).id for _ in range(5)]
    foreign = submit(desk, jsonl(line("a")), tenant="other").id
    page = desk.batches.list("acme", limit=2)
    assert ([b.id for b in page.items], page.has_more) == ([ids[4], ids[3]], True)
    page = desk.batches.list("acme", limit=3, after=ids[3])
    assert ([b.id for b in page.items], page.has_more) == ([ids[2], ids[1], ids[0]], False)
    for after in (foreign, "batch_nothing"):
        with pytest.raises(NotFound):
            desk.batches.list("acme", after=after)
    with pytest.raises(NotFound):
        desk.batches.get("acme", foreign)
    with pytest.raises(NotFound):
        desk.batches.cancel("acme", foreign)


async def test_a_tenant_that_goes(desk, clock):
    batch = submit(desk, jsonl(line("a")))
    kept = submit(desk, jsonl(line("a")), tenant="other")
    assert desk.batches.cancel_tenant("acme") == 1
    assert desk.files.delete_tenant("acme") == 1
    await finish(desk, batch, Echo(), clock)
    assert desk.batches.get("acme", batch.id).status is Status.CANCELLED
    assert desk.batches.get("other", kept.id).status is Status.COMPLETED


def test_rules_have_sane_defaults():
    rules = WorkRules()
    assert rules.renew_every_s * 3 <= rules.lease_s
