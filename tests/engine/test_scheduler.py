"""Who is paid: budgets, seats, blocks, classes and tenants. Nothing is computed here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fakes import Driver, PaperRunner, make_call, make_vectors, paper_driver

from omnilmm.engine.engine import Tokens
from omnilmm.engine.fair_queue import FAVOUR, OUTPUT_COST
from omnilmm.errors import Overloaded
from omnilmm.messages import Priority

BATCH = {"priority": Priority.BATCH}


def test_a_step_pays_no_more_than_its_budget():
    driver, runner = paper_driver(max_step_tokens=10)
    for seed in range(3):
        driver.submit(make_call(8, seed=seed))
    paid = []
    for _ in range(3):
        driver.step()
        paid.append(runner.last())
    assert paid == [{0: 8, 1: 2}, {0: 1, 1: 6, 2: 3}, {0: 1, 1: 1, 2: 5}]


def test_a_step_that_reads_enough_starts_no_further_prompt():
    """One prompt after the other, the first ones do not wait for the last."""
    driver, runner = paper_driver(max_step_tokens=40, enough_step_tokens=10)
    for seed, length in enumerate((12, 4, 5, 6, 30)):
        driver.submit(make_call(length, seed=seed))
    paid = []
    for _ in range(4):
        driver.step()
        paid.append(runner.last())
    assert paid == [
        {0: 12},
        {0: 1, 1: 4, 2: 5, 3: 6},
        {0: 1, 1: 1, 2: 1, 3: 1, 4: 30},
        dict.fromkeys(range(5), 1),
    ]


def test_a_batch_reads_as_much_as_fits():
    driver, runner = paper_driver(max_step_tokens=40, enough_step_tokens=10)
    for seed in range(3):
        driver.submit(make_call(12, seed=seed, **BATCH))
    driver.step()
    assert runner.last() == {0: 12, 1: 12, 2: 12}


def test_decodes_come_before_chunks_of_prompts():
    driver, runner = paper_driver(max_step_tokens=4)
    driver.submit(make_call(30))
    driver.submit(make_call(2, seed=1))
    while not driver.answers[1].ids:
        driver.step()
    assert driver.answers[0].ids  # in order of submission: the long prompt first
    driver.submit(make_call(30, seed=2))
    driver.step()
    assert runner.last() == {0: 1, 1: 1, 2: 2}


def test_seats_are_limited():
    driver, runner = paper_driver(max_sequences=2)
    for seed in range(3):
        driver.submit(make_call(4, seed=seed, max_tokens=2))
    driver.step()
    assert set(runner.last()) == {0, 1}
    driver.step()
    driver.step()
    assert set(runner.last()) == {2}


def test_a_full_queue_refuses_its_own_class_only():
    driver, _ = paper_driver(max_waiting=2)
    for _ in range(2):
        driver.submit(make_call(4, **BATCH))
    with pytest.raises(Overloaded) as caught:
        driver.submit(make_call(4, **BATCH))
    assert caught.value.retry_after
    driver.submit(make_call(4))
    driver.engine.check_integrity()
    driver.finish()
    assert sum(bool(answer.finish) for answer in driver.answers.values()) == 3


def test_online_goes_first():
    driver, runner = paper_driver(max_step_tokens=8)
    driver.submit(make_call(8, seed=1, **BATCH))
    driver.submit(make_call(8, seed=2))
    driver.step()
    assert runner.last() == {1: 8}
    driver.step()
    assert runner.last() == {1: 1, 0: 7}


def test_batch_yields_its_seat_within_one_step():
    driver, runner = paper_driver(max_sequences=2)
    for seed in range(2):
        driver.submit(make_call(4, seed=seed, **BATCH))
    driver.step()
    assert set(runner.last()) == {0, 1}
    driver.submit(make_call(4, seed=2))
    driver.step()
    assert set(runner.last()) == {2}  # the later of the two gave way, and the other sits out
    driver.step()
    assert set(runner.last()) == {0, 2}
    driver.finish()
    assert all(len(answer.ids) == 8 for answer in driver.answers.values())


def test_batch_yields_its_blocks_within_one_step():
    driver, runner = paper_driver(num_blocks=8, block_size=4)
    for seed in range(2):
        driver.submit(make_call(14, seed=seed, max_tokens=4, **BATCH))
    driver.step()
    driver.submit(make_call(15, seed=2, max_tokens=2))
    driver.step()
    assert set(runner.last()) == {2}
    driver.step()
    assert set(runner.last()) == {0, 2}
    driver.finish()
    assert [len(driver.answers[n].ids) for n in range(3)] == [4, 4, 2]


def test_a_batch_sits_out_while_an_online_prompt_is_read():
    driver, runner = paper_driver(max_step_tokens=8)
    driver.submit(make_call(4, max_tokens=20, **BATCH))
    driver.step()
    driver.submit(make_call(12, seed=1, max_tokens=3))
    paid = []
    for _ in range(4):
        driver.step()
        paid.append(runner.last())
    assert paid == [{1: 8}, {1: 4}, {0: 1, 1: 1}, {0: 1, 1: 1}]
    driver.finish()
    assert len(driver.answers[0].ids) == 20


def test_a_batch_adds_little_to_the_steps_of_people_and_fills_its_own():
    driver, runner = paper_driver(max_step_tokens=32, max_sequences=16, batch_beside_online=3)
    for seed in range(8):
        driver.submit(make_call(4, seed=seed, max_tokens=20, **BATCH))
    driver.step()
    driver.step()
    assert len(runner.last()) == 8
    online = driver.submit(make_call(4, seed=8, max_tokens=3))
    paid = []
    for _ in range(4):
        driver.step()
        paid.append((online in runner.last(), len(runner.last())))
    assert paid == [(True, 1), (True, 1 + 3), (True, 1 + 3), (False, 8)]
    driver.finish()


def test_a_tenant_that_has_every_seat_gives_some_up():
    driver, runner = paper_driver(max_sequences=8, max_waiting=64)
    for seed in range(12):
        driver.submit(make_call(4, seed=seed, max_tokens=20, tenant="greedy"))
    driver.step()
    assert set(runner.last()) == set(range(8))
    for seed in range(6):
        driver.submit(make_call(4, seed=20 + seed, max_tokens=20, tenant="late"))
    seats = []
    for _ in range(5):
        driver.step()
        seats.append(sorted(runner.last()))
    assert seats == [  # the newest went, one a step, until they have about as many
        [0, 1, 2, 3, 4, 5, 6, 12],
        [0, 1, 2, 3, 4, 5, 12, 13],
        [0, 1, 2, 3, 4, 12, 13, 14],
        [0, 1, 2, 3, 4, 12, 13, 14],
        [0, 1, 2, 3, 4, 12, 13, 14],
    ]
    driver.finish()
    assert driver.engine.stats().num_preemptions >= 3
    assert all(len(answer.ids) == 20 for answer in driver.answers.values())


def test_seats_are_shared_whatever_their_tenants_were_served():
    driver, runner = paper_driver(max_sequences=8, max_waiting=64, num_blocks=600, max_context=2000)
    driver.run(make_call(1500, max_tokens=2, tenant="heavy"))
    for seed in range(12):
        driver.submit(make_call(4, seed=seed, max_tokens=20, tenant="newcomer"))
    driver.step()
    heavy = [driver.submit(make_call(4, seed=20 + seed, max_tokens=9, tenant="heavy")) for seed in range(6)]
    seats = []
    for _ in range(5):
        driver.step()
        seats.append(sum(sequence_id in heavy for sequence_id in runner.last()))
    assert seats == [1, 2, 3, 3, 3]
    driver.finish()


def test_who_has_no_seat_takes_none_where_seats_are_few():
    driver, _ = paper_driver(max_sequences=2, num_blocks=600, max_context=2000)
    driver.run(make_call(1500, max_tokens=2, tenant="heavy"))
    for seed in range(4):
        driver.submit(make_call(4, seed=seed, max_tokens=20, tenant="newcomer"))
    driver.step()
    driver.submit(make_call(4, seed=20, max_tokens=3, tenant="heavy"))
    driver.finish()
    assert driver.engine.stats().num_preemptions == 0


def make_favoured(**changes: int) -> tuple[Driver, PaperRunner]:
    """An engine on which "greedy" was served much and has two answers under way, and "modest" was served nothing."""
    driver, runner = paper_driver(num_blocks=2400, max_context=9600, **changes)
    driver.run(make_call(9000, max_tokens=2, tenant="greedy"))
    for seed in (1, 2):
        driver.submit(make_call(6, seed=seed, max_tokens=40, tenant="greedy"))
    driver.step()
    return driver, runner


def test_others_sit_out_while_a_favoured_prompt_is_read():
    driver, runner = make_favoured(max_step_tokens=16)
    modest = driver.submit(make_call(20, seed=3, max_tokens=3, tenant="modest"))
    greedy = driver.submit(make_call(20, seed=4, max_tokens=3, tenant="greedy"))
    paid = []
    for _ in range(4):
        driver.step()
        paid.append(runner.last())
    assert paid == [{modest: 16}, {modest: 4}, {1: 1, 2: 1, modest: 1, greedy: 13}, {1: 1, 2: 1, modest: 1, greedy: 7}]
    driver.finish()
    assert [len(driver.answers[n].ids) for n in (1, 2)] == [40, 40]


def test_a_long_prompt_uses_up_its_favour():
    driver, runner = make_favoured(max_step_tokens=1024)
    modest = driver.submit(make_call(int(FAVOUR) + 1000, seed=3, max_tokens=3, tenant="modest"))
    driver.step()
    assert runner.last() == {modest: 1024}
    driver.step()
    assert runner.last() == {1: 1, 2: 1, modest: 1022}
    driver.finish()


def test_a_step_makes_way_for_a_favoured_tenant_and_that_one_pays():
    driver, _ = make_favoured()
    coming = make_call(6, seed=3, max_tokens=2, tenant="modest")
    others = (make_call(6, seed=4, tenant="greedy"), replace(coming, priority=Priority.BATCH))
    plan = driver.engine._scheduler.choose()
    scheduler = driver.engine._scheduler
    assert [scheduler.makes_way(plan, call) for call in (coming, *others)] == [True, False, False]
    own = replace(plan, rows=tuple(row for row in plan.rows if row.sequence_id == 1))
    driver.engine._sequences[1].call = replace(driver.engine._sequences[1].call, tenant="modest")
    assert scheduler.makes_way(plan, coming)  # its own answer under way does not count
    assert not scheduler.makes_way(own, coming)
    num_paid = 0
    while scheduler.makes_way(plan, coming):
        scheduler.charge_given_up(plan, coming)
        num_paid += 1
    assert num_paid == int(FAVOUR / (2 * OUTPUT_COST)) + 1
    driver.finish()


def test_a_favoured_tenant_gets_the_seats_it_asks_for():
    """All but one of those that the other has: it goes first, and waits for no seat of who was served more."""
    driver, runner = paper_driver(max_sequences=6, max_waiting=64, num_blocks=2400, max_context=9600)
    driver.run(make_call(9000, max_tokens=2, tenant="greedy"))
    for seed in range(8):
        driver.submit(make_call(6, seed=seed, max_tokens=40, tenant="greedy"))
    driver.step()
    modest = [driver.submit(make_call(6, seed=20 + seed, max_tokens=12, tenant="modest")) for seed in range(7)]
    seats = []
    for _ in range(7):
        driver.step()
        seats.append(sum(sequence_id in modest for sequence_id in runner.last()))
    assert seats == [1, 2, 3, 4, 5, 5, 5]
    driver.finish()
    assert all(len(answer.ids) in (2, 12, 40) for answer in driver.answers.values())


def test_favour_is_no_reason_to_take_seats_of_others_who_have_it():
    driver, _ = make_favoured(max_sequences=6)
    for seed in range(3):
        driver.submit(make_call(6, seed=20 + seed, max_tokens=12, tenant="modest"))
    driver.step()
    for seed in range(3):
        driver.submit(make_call(6, seed=30 + seed, max_tokens=12, tenant="other"))
    for _ in range(4):
        driver.step()
    tenants = [other.call.tenant for other in driver.engine._scheduler._running.values()]
    assert sorted(tenants) == ["greedy", "modest", "modest", "modest", "other", "other"]
    driver.finish()


def test_a_weight_is_no_reason_to_take_the_only_seat():
    driver, _ = paper_driver(max_sequences=1)
    driver.submit(make_call(4, seed=1, max_tokens=9, tenant="light"))
    driver.step()
    driver.submit(make_call(4, seed=2, max_tokens=9, tenant="heavy", weight=4.0))
    driver.finish()
    assert driver.engine.stats().num_preemptions == 0


def test_a_seat_taken_by_favour_is_not_taken_back_by_weight():
    driver, runner = paper_driver(max_sequences=6, max_waiting=64, num_blocks=2400, max_context=9600)
    driver.run(make_call(9000, max_tokens=2, tenant="heavy", weight=4.0))
    for seed in range(8):
        driver.submit(make_call(6, seed=seed, max_tokens=40, tenant="heavy", weight=4.0))
    driver.step()
    modest = [driver.submit(make_call(6, seed=20 + seed, max_tokens=12, tenant="modest")) for seed in range(7)]
    seats = []
    for _ in range(7):
        driver.step()
        seats.append(sum(sequence_id in modest for sequence_id in runner.last()))
    assert seats == [1, 2, 3, 4, 5, 5, 5]
    assert driver.engine.stats().num_preemptions == 5
    driver.finish()


def test_one_that_is_about_to_be_stuck_takes_no_seat():
    """It would be pushed out again by the next that can run, who would lose what was computed of its prompt."""
    driver, _ = paper_driver(max_sequences=2)
    others = [driver.submit(make_call(6, seed=seed, max_tokens=5, tenant="other")) for seed in (1, 2, 3)]
    driver.step()
    stuck = driver.submit(make_call(9, pictures=[("a", 3, 5)], with_vectors=False, tenant="one", weight=4.0))
    driver.finish()
    assert [len(driver.answers[other].ids) for other in others] == [5, 5, 5]
    assert driver.engine.stats().num_preemptions == 0
    driver.engine.supply(stuck, "a", make_vectors("a", 5))
    driver.finish()
    assert len(driver.answers[stuck].ids) == 8


def test_equal_tenants_take_no_seats_from_one_another():
    driver, _ = paper_driver(max_sequences=4)
    for seed in range(12):
        driver.submit(make_call(4, seed=seed, max_tokens=5, tenant=f"t{seed % 4}"))
    driver.finish()
    assert driver.engine.stats().num_preemptions == 0


def test_nobody_below_starts_while_online_waits_for_room():
    driver, runner = paper_driver(num_blocks=8, block_size=4)
    driver.submit(make_call(20, max_tokens=4))
    driver.step()
    driver.submit(make_call(20, seed=1, max_tokens=4))  # no room beside the first
    driver.submit(make_call(4, seed=2, max_tokens=4, **BATCH))  # there would be
    driver.step()
    assert set(runner.last()) == {0}
    driver.finish()
    assert driver.engine.stats().num_preemptions == 0


def test_the_latest_gives_way_when_blocks_run_out():
    driver, _ = paper_driver(num_blocks=6, block_size=4)
    for seed in range(3):
        driver.submit(make_call(7, seed=seed, max_tokens=12))
    preempted_at = None
    while driver.engine.has_work:
        driver.step()
        if preempted_at is None and driver.engine.stats().num_preemptions:
            preempted_at = {n: len(driver.answers[n].ids) for n in range(3)}
    assert preempted_at is not None
    finished = [n for n in range(3) if driver.answers[n].finish]
    assert finished == [0, 1, 2]
    assert all(len(answer.ids) == 12 for answer in driver.answers.values())


def test_a_newcomer_waits_behind_one_that_lacks_a_block():
    driver, runner = paper_driver(num_blocks=4, block_size=4)
    driver.submit(make_call(5, max_tokens=3))  # two blocks, room to grow
    driver.submit(make_call(8, seed=1, max_tokens=3))  # two blocks, both full
    driver.step()
    driver.submit(make_call(2, seed=2, max_tokens=3))
    driver.step()
    assert runner.last() == {0: 1}
    assert driver.engine.stats().num_preemptions == 0
    driver.finish()
    assert all(len(answer.ids) == 3 for answer in driver.answers.values())


def test_order_of_finishing_follows_submission_under_pressure():
    driver, _ = paper_driver(num_blocks=6, block_size=4)
    for seed in range(4):
        driver.submit(make_call(7, seed=seed, max_tokens=12))
    ends = []
    while driver.engine.has_work:
        ends += [o.sequence_id for o in driver.step() if isinstance(o, Tokens) and o.batch.finish]
    assert ends == [0, 1, 2, 3]


def test_tenants_share_by_weight():
    driver, _ = paper_driver(max_sequences=2)
    for seed in range(12):
        driver.submit(make_call(4, seed=seed, max_tokens=3, tenant="flood"))
    for seed in range(4):
        driver.submit(make_call(4, seed=20 + seed, max_tokens=3, tenant="victim", weight=3.0))
    ends = []
    while driver.engine.has_work:
        ends += [o.sequence_id for o in driver.step() if isinstance(o, Tokens) and o.batch.finish]
    victims = [ends.index(sequence_id) for sequence_id in range(12, 16)]
    assert max(victims) <= 7  # though twelve calls of the other tenant came first


def test_a_missing_first_picture_lets_others_pass():
    driver, runner = paper_driver()
    first = driver.submit(make_call(8, pictures=[("a", 0, 4)], with_vectors=False))
    driver.submit(make_call(4, seed=1))
    driver.step()
    assert set(runner.last()) == {1}
    driver.engine.supply(first, "a", make_vectors("a", 4))
    driver.step()
    assert runner.last() == {0: 8, 1: 1}


def test_tokens_before_a_missing_picture_are_paid():
    driver, runner = paper_driver()
    first = driver.submit(make_call(20, pictures=[("a", 10, 4)], with_vectors=False))
    assert driver.answers[first].needed == ["a"]
    driver.step()
    assert runner.last() == {0: 10}
    driver.step()
    assert runner.last() == {}
    assert not driver.engine.has_work  # nothing to do until the picture comes
    driver.engine.supply(first, "a", make_vectors("a", 4))
    assert driver.engine.has_work
    driver.step()
    assert runner.last() == {0: 10}
    assert driver.answers[first].needed == ["a"]  # asked once


def test_one_that_is_stuck_gives_its_seat_to_one_that_can_run():
    driver, runner = paper_driver(max_sequences=1)
    stuck = driver.submit(make_call(20, pictures=[("a", 10, 4)], with_vectors=False))
    driver.step()
    driver.submit(make_call(4, seed=1, max_tokens=3))
    driver.step()
    assert set(runner.last()) == {1}
    driver.engine.supply(stuck, "a", make_vectors("a", 4))
    driver.finish()
    assert len(driver.answers[stuck].ids) == 8


def test_an_abort_may_give_others_work():
    driver, runner = paper_driver(max_sequences=1)
    stuck = driver.submit(make_call(20, pictures=[("a", 10, 4)], with_vectors=False))
    driver.submit(make_call(4, seed=1, **BATCH))
    driver.finish()
    assert {row.sequence_id for plan in runner.plans for row in plan.rows} == {stuck}  # of the higher class
    driver.engine.abort(stuck)
    assert driver.engine.has_work
    driver.finish()
    assert len(driver.answers[1].ids) == 8


def test_two_that_are_stuck_do_not_chase_one_another():
    driver, runner = paper_driver(max_sequences=1)
    for seed in range(2):
        driver.submit(make_call(20, seed=seed, pictures=[("a", 11, 4)], with_vectors=False))
    for _ in range(5):
        driver.step()
    assert [len(plan.rows) for plan in runner.plans] == [1, 0, 0, 0, 0]
    assert driver.engine.stats().num_preemptions == 0


def test_a_waiting_sequence_asks_again_when_its_prefix_is_gone():
    """The picture was in the pool when the call came in, and is not any more when its turn comes."""
    driver, _ = paper_driver(num_blocks=8, block_size=4, max_sequences=1)
    picture = {"pictures": [("a", 0, 8)]}
    driver.run(make_call(12, max_tokens=2, **picture))
    driver.submit(make_call(28, seed=5, max_tokens=4))  # will take every block
    waiting = driver.submit(make_call(12, max_tokens=2, with_vectors=False, **picture))
    assert driver.answers[waiting].needed == []
    driver.finish()
    assert driver.answers[waiting].needed == ["a"]
    driver.engine.supply(waiting, "a", make_vectors("a", 8))
    driver.finish()
    assert driver.answers[waiting].finish


def test_equal_prompts_wait_for_the_first_to_be_computed():
    driver, runner = paper_driver(max_step_tokens=8)
    for _ in range(3):
        driver.submit(make_call(18, max_tokens=2))
    driver.submit(make_call(3, seed=1, max_tokens=2))
    paid = []
    for _ in range(4):
        driver.step()
        paid.append(runner.last())
    assert paid == [{0: 8}, {0: 8}, {0: 2, 1: 2, 2: 2, 3: 2}, {0: 1, 1: 1, 2: 1, 3: 1}]


def test_recomputing_is_not_charged_to_the_tenant():
    driver, runner = paper_driver(num_blocks=6, block_size=4)
    for seed in range(2):
        driver.submit(make_call(9, seed=seed, max_tokens=12, tenant=f"t{seed}"))
    driver.finish()
    assert driver.engine.stats().num_preemptions > 0
    assert sum(plan.num_tokens for plan in runner.plans) > 2 * (9 + 11)  # some was computed twice
    counters = driver.engine._scheduler._queues[Priority.ONLINE]._counters
    assert counters["t0"] == counters["t1"]


def test_one_tenant_cannot_fill_the_queue():
    driver, _ = paper_driver(max_sequences=1, max_waiting=9)
    for seed in range(6):
        driver.submit(make_call(4, seed=seed, tenant="greedy"))
    with pytest.raises(Overloaded):
        driver.submit(make_call(4, seed=6, tenant="greedy"))  # six wait, three more could
    for seed in range(2):
        driver.submit(make_call(4, seed=7 + seed, tenant="late"))
