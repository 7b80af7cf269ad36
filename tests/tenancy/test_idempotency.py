"""A POST that comes twice is carried out once."""

from __future__ import annotations

import pickle
import threading

import pytest

from omnilmm.errors import InvalidRequest
from omnilmm.tenancy.idempotency import (
    Claim,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    IdempotencyStore,
    SavedAnswer,
    check_idempotency_key,
    fingerprint,
)

BODY = fingerprint(b"purpose", b"batch")
DONE = SavedAnswer(200, b'{"id":"file-1"}')


@pytest.fixture
def store(database, clock):
    return IdempotencyStore(database, lease_s=100, keep_s=1000, wall=clock)


def begin(store, body=BODY, *, tenant="acme", operation="files", key="k"):
    return store.begin(tenant, operation, key, body)


def test_the_second_gets_what_the_first_got(store, clock):
    claim = begin(store)
    assert isinstance(claim, Claim)
    with pytest.raises(IdempotencyInProgress) as busy:
        begin(store)
    assert (busy.value.status, busy.value.retry_after) == (409, 1)
    assert store.finish(claim, DONE)
    assert begin(store) == DONE
    clock.now += 999
    assert begin(store) == DONE


def test_another_body_is_refused_before_and_after(store):
    claim = begin(store)
    for _ in range(2):
        with pytest.raises(IdempotencyKeyReused) as reused:
            begin(store, fingerprint(b"other"))
        assert reused.value.status == 422
        store.finish(claim, DONE)
    assert begin(store) == DONE


def test_keys_are_each_tenant_s_and_operation_s_own(store):
    store.finish(begin(store), DONE)
    assert isinstance(begin(store, tenant="other"), Claim)
    assert isinstance(begin(store, operation="batches"), Claim)
    assert isinstance(begin(store, key="K"), Claim)


def test_what_was_not_carried_out_may_be_tried_again(store):
    store.abandon(begin(store))
    again = begin(store, fingerprint(b"mended"))
    assert isinstance(again, Claim)
    store.finish(again, DONE)
    store.abandon(again)  # too late to take it back
    assert begin(store, fingerprint(b"mended")) == DONE


def test_an_answer_is_kept_for_its_time(store, clock):
    store.finish(begin(store), DONE)
    clock.now += 1000
    assert isinstance(begin(store, fingerprint(b"new")), Claim)


def test_a_dead_holder_is_replaced_and_cannot_speak_any_more(store, clock):
    dead = begin(store)
    clock.now += 99
    with pytest.raises(IdempotencyInProgress):
        begin(store)
    clock.now += 1
    heir = begin(store)
    assert isinstance(heir, Claim)
    assert not store.finish(dead, SavedAnswer(200, b"from the grave"))
    store.abandon(dead)
    assert store.finish(heir, DONE)
    assert begin(store) == DONE


def test_of_many_at_once_one_goes_on(store):
    told = []

    def ask():
        try:
            told.append(begin(store))
        except IdempotencyInProgress as busy:
            told.append(busy)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 8
    assert sum(isinstance(one, Claim) for one in told) == 1


def test_old_claims_are_swept(store, clock):
    store.finish(begin(store, key="done"), DONE)
    begin(store, key="dead")
    clock.now += 500
    store.finish(begin(store, key="fresh"), DONE)
    assert store.forget_old() == 1
    clock.now += 500
    assert store.forget_old() == 1
    assert begin(store, key="fresh") == DONE


def test_answers_are_bounded(store):
    claim = begin(store)
    with pytest.raises(ValueError, match="this long"):
        store.finish(claim, SavedAnswer(200, b"x" * ((1 << 20) + 1)))


@pytest.mark.parametrize("value", ["", "a b", "x" * 256, "ü", "a\n", "\0"])
def test_keys_are_plain(value):
    with pytest.raises(InvalidRequest) as caught:
        check_idempotency_key(value)
    assert caught.value.param == "idempotency-key"


def test_a_key_may_be_missing_or_long():
    assert check_idempotency_key(None) is None
    assert check_idempotency_key("x" * 255) == "x" * 255


def test_fingerprints_know_where_parts_end():
    assert fingerprint(b"ab", b"c") != fingerprint(b"a", b"bc")
    assert fingerprint(b"a") == fingerprint(b"a")


def test_the_errors_travel():
    assert pickle.loads(pickle.dumps(IdempotencyKeyReused("No."))).status == 422
