from __future__ import annotations

import pytest
from cache_fakes import HandClock

from omnilmm.cache.breaker import Breaker, Entry, Outcome


@pytest.fixture
def breaker(clock: HandClock) -> Breaker:
    return Breaker(clock, failures=2, open_s=1.0)


def call(breaker: Breaker, outcome: Outcome) -> Entry | None:
    entry = breaker.try_enter()
    if entry is not None:
        breaker.leave(entry, outcome)
    return entry


def test_failures_in_a_row_open_it(breaker: Breaker) -> None:
    call(breaker, Outcome.FAILED)
    call(breaker, Outcome.ANSWERED)
    call(breaker, Outcome.FAILED)
    assert not breaker.is_open
    call(breaker, Outcome.FAILED)
    assert breaker.is_open
    assert breaker.try_enter() is None


def test_one_timeout_opens_it(breaker: Breaker) -> None:
    call(breaker, Outcome.TIMED_OUT)
    assert breaker.is_open


def test_a_caller_who_left_tells_nothing(breaker: Breaker) -> None:
    call(breaker, Outcome.FAILED)
    call(breaker, Outcome.CANCELLED)
    assert not breaker.is_open
    call(breaker, Outcome.FAILED)
    assert breaker.is_open


def test_one_probe_at_a_time_and_its_answer_closes(breaker: Breaker, clock: HandClock) -> None:
    call(breaker, Outcome.TIMED_OUT)
    clock.now += 0.99
    assert breaker.try_enter() is None
    clock.now += 0.02
    assert breaker.try_enter() is Entry.PROBE
    assert breaker.try_enter() is None
    assert breaker.is_open
    breaker.leave(Entry.PROBE, Outcome.ANSWERED)
    assert not breaker.is_open
    assert breaker.try_enter() is Entry.CALL


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.TIMED_OUT])
def test_a_failed_probe_keeps_it_open_for_another_term(breaker: Breaker, clock: HandClock, outcome: Outcome) -> None:
    call(breaker, Outcome.TIMED_OUT)
    clock.now += 1.0
    assert call(breaker, outcome) is Entry.PROBE
    clock.now += 0.99
    assert breaker.try_enter() is None
    clock.now += 0.01
    assert call(breaker, Outcome.ANSWERED) is Entry.PROBE
    assert not breaker.is_open


def test_a_cancelled_probe_frees_its_place(breaker: Breaker, clock: HandClock) -> None:
    call(breaker, Outcome.TIMED_OUT)
    clock.now += 1.0
    call(breaker, Outcome.CANCELLED)
    assert breaker.is_open
    assert breaker.try_enter() is Entry.PROBE


def test_stragglers_neither_close_nor_prolong_it(breaker: Breaker, clock: HandClock) -> None:
    entries = [breaker.try_enter() for _ in range(3)]
    breaker.leave(entries[0], Outcome.TIMED_OUT)
    clock.now += 0.5
    breaker.leave(entries[1], Outcome.ANSWERED)
    assert breaker.is_open
    breaker.leave(entries[2], Outcome.TIMED_OUT)
    clock.now += 0.5
    assert breaker.try_enter() is Entry.PROBE
