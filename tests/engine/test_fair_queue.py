from __future__ import annotations

from itertools import count

import pytest
from engine_fakes import make_call

from omnilmm.engine.fair_queue import FAVOUR, IDLE_CREDIT, OUTPUT_COST, FairQueue
from omnilmm.engine.sequence import Sequence


@pytest.fixture
def make():
    ids = count()

    def make_sequence(tenant: str, weight: float = 1.0) -> Sequence:
        return Sequence(next(ids), make_call(4, tenant=tenant, weight=weight), block_size=4, submitted_at=0.0)

    return make_sequence


def serve(queue: FairQueue, num_turns: int, prompt: int = 10) -> list[str]:
    """Let the first in turn go, again and again; the tenants served."""
    tenants = []
    for _ in range(num_turns):
        sequence = next(queue.in_turn())
        queue.remove(sequence)
        queue.charge(sequence, prompt=prompt)
        queue.check_integrity()
        tenants.append(sequence.call.tenant)
    return tenants


def test_one_tenant_is_served_in_order(make):
    queue = FairQueue()
    sequences = [make("a") for _ in range(4)]
    for sequence in (sequences[2], sequences[0], sequences[3], sequences[1]):  # as preemption brings them back
        queue.push(sequence)
    assert list(queue.in_turn()) == sequences
    assert len(queue) == 4


def test_a_flood_does_not_delay_another_tenant(make):
    queue = FairQueue()
    for _ in range(20):
        queue.push(make("flood"))
    for _ in range(3):
        queue.push(make("victim"))
    assert serve(queue, 6).count("victim") == 3


def test_weights_divide_the_work(make):
    queue = FairQueue()
    for _ in range(30):
        queue.push(make("heavy", weight=3.0))
        queue.push(make("light"))
    served = serve(queue, 20)
    assert served.count("heavy") == 15


def test_output_counts_more_than_prompt(make):
    queue = FairQueue()
    chatty, quiet = make("chatty"), make("quiet")
    for _ in range(10):
        queue.push(make("chatty"))
        queue.push(make("quiet"))
    queue.charge(chatty, output=10)
    queue.charge(quiet, prompt=10)
    assert OUTPUT_COST > 1
    assert serve(queue, 1) == ["quiet"]


def test_idleness_earns_a_little_credit_and_no_more(make):
    queue = FairQueue()
    for _ in range(80):
        queue.push(make("busy"))
    serve(queue, 40, prompt=int(IDLE_CREDIT) // 4)
    for _ in range(20):
        queue.push(make("late"))
    served = serve(queue, 14, prompt=int(IDLE_CREDIT) // 4)
    assert served[:4] == ["late"] * 4  # though it was away for ten times as much
    assert served[4:].count("late") == 5


def test_many_who_come_at_a_time_get_the_same_credit(make):
    queue = FairQueue()
    for _ in range(40):
        queue.push(make("busy"))
    serve(queue, 20, prompt=int(IDLE_CREDIT))
    tenants = [f"late {number}" for number in range(4)]
    for tenant in tenants:  # each comes when the others are there
        for _ in range(20):
            queue.push(make(tenant))
    served = serve(queue, 40, prompt=int(IDLE_CREDIT) // 4)
    assert {served.count(tenant) for tenant in tenants} <= {8, 9}


def test_who_asks_now_and_then_does_not_wait_for_what_it_took_before(make):
    queue = FairQueue()
    for _ in range(40):
        queue.push(make("busy"))
    serve(queue, 20, prompt=int(IDLE_CREDIT) // 4)
    for _ in range(3):
        queue.push(make("modest"))
        assert serve(queue, 1, prompt=int(IDLE_CREDIT) // 4) == ["modest"]
        serve(queue, 1, prompt=int(IDLE_CREDIT) // 8)


def test_an_empty_queue_remembers_the_level(make):
    queue = FairQueue()
    queue.push(make("first"))
    serve(queue, 1, prompt=10 * int(IDLE_CREDIT))
    for _ in range(4):
        queue.push(make("second"))
        queue.push(make("first"))
    assert serve(queue, 4, prompt=int(IDLE_CREDIT)).count("first") >= 1


def test_it_knows_how_many_of_a_tenant_wait(make):
    queue = FairQueue()
    assert queue.num_of("a") == 0
    for tenant in ("a", "b", "a"):
        queue.push(make(tenant))
    assert (queue.num_of("a"), queue.num_of("b"), len(queue)) == (2, 1, 3)


def test_favour_is_for_who_asks_for_little(make):
    queue = FairQueue()
    for _ in range(40):
        queue.push(make("busy"))
    assert not queue.is_favoured("busy")
    assert not queue.is_favoured("new")  # nobody has been served yet
    serve(queue, 20, prompt=int(IDLE_CREDIT))
    assert not queue.is_favoured("busy")
    assert queue.is_favoured("new")
    queue.push(make("new"))
    assert queue.is_favoured("new")
    assert serve(queue, 1, prompt=int(FAVOUR) - 1) == ["new"]
    assert queue.is_favoured("new")  # just
    queue.fine(make("new").call, 2)
    assert not queue.is_favoured("new")
    queue.push(make("new"))
    assert serve(queue, 1) == ["new"]  # but it still has credit


def test_a_fine_is_paid_by_who_is_about_to_come(make):
    queue = FairQueue()
    for _ in range(40):
        queue.push(make("busy"))
    serve(queue, 20, prompt=int(IDLE_CREDIT))
    queue.fine(make("late", weight=2.0).call, 2 * (IDLE_CREDIT + 1))
    queue.push(make("late"))
    assert serve(queue, 1) == ["busy"]
