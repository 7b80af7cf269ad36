"""Whole runs of the engine with a real small model, each compared with the lone run of its call."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fakes import (
    VOCAB,
    ComesLate,
    all_ids,
    lone_run,
    make_call,
    make_driver,
    make_ids,
    make_vectors,
    recorded_driver,
)

from omnilmm.errors import ContextLengthExceeded, InvalidRequest
from omnilmm.messages import FinishReason, Prefill, Priority, Sampling

RANDOM = Sampling(0, temperature=1.0, top_p=0.95, seed=5)
PICTURE = {"pictures": [("a", 2, 8)]}


def test_a_lone_call(model):
    driver = make_driver(model)
    call = make_call(11)
    (answer,) = driver.run(call)
    assert answer.ids == lone_run(model, call)
    assert answer.finish is FinishReason.LENGTH
    assert answer.prefill.num_prompt_tokens == 11
    assert answer.prefill.num_cached_tokens == 0
    assert driver.engine.is_empty


def test_the_model_listens_to_its_whole_context(model):
    """The oracle is worth something: changing any one prompt token changes what follows."""
    ids = make_ids(12)
    answers = {lone_run(model, make_call((*ids[:n], (ids[n] + 1) % VOCAB, *ids[n + 1 :]))) for n in range(12)}
    assert len(answers) == 12
    assert lone_run(model, make_call(ids)) not in answers


@pytest.mark.parametrize("max_step_tokens", [1, 3, 7, 64])
@pytest.mark.parametrize("sampling", [None, RANDOM], ids=["greedy", "random"])
def test_batches_and_chunks_change_nothing(model, max_step_tokens, sampling):
    calls = [make_call(3 + 4 * n, seed=n, max_tokens=3 + n, sampling=sampling) for n in range(5)]
    calls.append(make_call(20, seed=9, sampling=sampling, **PICTURE))
    answers = make_driver(model, max_step_tokens=max_step_tokens).run(*calls)
    assert all_ids(answers) == [lone_run(model, call) for call in calls]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_sizes_change_nothing(model, block_size):
    calls = [make_call(5 + 6 * n, seed=n, sampling=RANDOM) for n in range(3)]
    answers = make_driver(model, block_size=block_size, max_step_tokens=9).run(*calls)
    assert all_ids(answers) == [lone_run(model, call) for call in calls]


@pytest.mark.parametrize("sampling", [None, RANDOM], ids=["greedy", "random"])
def test_preemption_changes_nothing(model, sampling):
    calls = [make_call(6 + n, seed=n, max_tokens=10, sampling=sampling) for n in range(5)]
    calls.append(make_call(10, seed=8, sampling=sampling, **PICTURE))
    driver = make_driver(model, num_blocks=7, block_size=3)
    answers = driver.run(*calls)
    assert driver.engine.stats().num_preemptions >= 3
    assert all_ids(answers) == [lone_run(model, call) for call in calls]


def test_the_whole_pool_can_be_used_by_one(model):
    call = make_call(9, max_tokens=8)
    driver = make_driver(model, num_blocks=4, block_size=4)
    assert driver.run(call)[0].ids == lone_run(model, call)
    with pytest.raises(ContextLengthExceeded):
        driver.submit(make_call(9, max_tokens=9))
    with pytest.raises(InvalidRequest):
        driver.submit(make_call((VOCAB,)))
    driver.engine.check_integrity()


def test_a_stop_id_is_the_last_id(model):
    ids = lone_run(model, make_call(11))
    call = make_call(11, sampling=Sampling(0, stop_ids=(ids[3],)))
    (answer,) = make_driver(model).run(call)
    assert answer.ids == ids[: ids.index(ids[3]) + 1]
    assert answer.finish is FinishReason.STOP


def test_min_tokens_keeps_it_going(model):
    ids = lone_run(model, make_call(11))
    call = make_call(11, sampling=Sampling(0, stop_ids=(ids[0],), min_tokens=4))
    (answer,) = make_driver(model).run(call)
    assert ids[0] not in answer.ids[:4]
    assert answer.ids == lone_run(model, call)


def test_logprobs_come_with_each_token(model):
    (answer,) = make_driver(model).run(make_call(11, sampling=Sampling(0, logprobs=3)))
    assert len(answer.logprobs) == len(answer.ids) == 8
    for token_id, logprob in zip(answer.ids, answer.logprobs, strict=True):
        assert logprob.top[0] == (token_id, logprob.logprob)  # greedy draws the best
        assert len(logprob.top) == 3


# -- prefixes -----------------------------------------------------------------------------------------


def test_a_second_turn_computes_only_what_is_new(model):
    driver, runner = recorded_driver(model)
    first = make_call(22, max_tokens=7)
    (answer,) = driver.run(first)
    second = make_call((*first.prompt.ids, *answer.ids, *make_ids(5, seed=3)))
    (again,) = driver.run(second)
    assert again.ids == lone_run(model, second)
    assert again.prefill.num_cached_tokens == 28  # all full blocks of 22 + 6 computed tokens
    assert runner.computed(1) == len(second.prompt.ids) - 28 + 7


def test_a_wholly_cached_prompt_still_gets_its_logits(model):
    driver, runner = recorded_driver(model)
    call = make_call(16)
    first, second = driver.run(call)[0], driver.run(call)[0]
    assert first.ids == second.ids == lone_run(model, call)
    assert second.prefill.num_cached_tokens == 12
    assert runner.computed(1) == 4 + 7


def test_running_sequences_share_their_prefix(model):
    driver, runner = recorded_driver(model)
    prefix = make_ids(16)
    calls = [make_call((*prefix, 30 + n)) for n in range(4)]
    for call in calls:
        driver.submit(call)
    driver.step()
    driver.step()
    assert driver.engine.stats().blocks_used == 4 + 4  # four of the five blocks of each are the same
    assert [plan.num_tokens for plan in runner.plans] == [17, 1 + 3]  # and were computed once, by the first
    driver.finish()
    assert all_ids(driver.answers.values()) == [lone_run(model, call) for call in calls]


@pytest.mark.parametrize(
    "other",
    [{"scope": "other"}, {"adapter": "lora"}, {"scope": "default", "adapter": "default"}],
    ids=["scope", "adapter", "both"],
)
def test_scopes_and_adapters_never_share(model, other):
    driver = make_driver(model)
    call = make_call(16)
    driver.run(call)
    (stranger,) = driver.run(replace(call, **other))
    assert stranger.prefill.num_cached_tokens == 0
    (relative,) = driver.run(replace(call, **other))
    assert relative.prefill.num_cached_tokens == 12
    assert stranger.ids == relative.ids == lone_run(model, call)


def test_tenants_of_one_scope_share(model):
    driver = make_driver(model)
    driver.run(make_call(16, tenant="a"))
    assert driver.run(make_call(16, tenant="b", priority=Priority.BATCH))[0].prefill.num_cached_tokens == 12


def test_pictures_are_told_apart_by_key_and_place(model):
    driver = make_driver(model)
    calls = [
        make_call(20, pictures=[("a", 2, 8)]),
        make_call(20, pictures=[("b", 2, 8)]),
        make_call(20, pictures=[("a", 4, 8)]),
        make_call(20, pictures=[("a", 2, 4), ("a", 6, 4)]),
        make_call(20, pictures=[("a", 2, 4), ("b", 6, 4)]),
    ]
    assert len({call.prompt.ids for call in calls}) == 2  # the ids alone say little
    for call in calls:
        (answer,) = driver.run(call)
        assert answer.prefill.num_cached_tokens in (0, 4)  # [0, 4) may be shared by pictures cut alike
        assert answer.ids == lone_run(model, call)


def test_a_picture_in_the_pool_needs_no_vectors(model):
    driver = make_driver(model)
    call = make_call(20, pictures=[("a", 2, 8), ("b", 12, 4)])
    driver.run(call)
    bare = replace(call, images=tuple(replace(image, embedding=None) for image in call.images))
    longer = replace(bare, prompt=replace(bare.prompt, ids=(*bare.prompt.ids, 30, 31)))
    (answer,) = driver.run(longer)
    assert answer.needed == []
    assert answer.prefill == Prefill(22, 20, kv_images=(0, 1), queue_s=answer.prefill.queue_s)
    with_vectors = replace(call, prompt=longer.prompt)
    assert answer.ids == lone_run(model, with_vectors)


def test_turn_two_of_a_picture_chat_computes_only_its_new_tokens(model):
    """And asks for no vector: on counters, the runner's as well as the engine's own."""
    driver, runner = recorded_driver(model)
    first = make_call(30, max_tokens=6, pictures=[("a", 2, 8), ("b", 14, 6)])
    (answer,) = driver.run(first)
    before = driver.engine.stats()
    turn_two = (*first.prompt.ids, *answer.ids, *make_ids(7, seed=3))  # 43 tokens, 35 of them computed before
    bare = tuple(replace(image, embedding=None) for image in first.images)
    second = replace(first, prompt=replace(first.prompt, ids=turn_two), images=bare)
    (again,) = driver.run(second)
    new = len(turn_two) - 32  # the last block of turn one was not full
    after = driver.engine.stats()
    assert again.needed == []
    assert again.prefill.kv_images == (0, 1)
    assert runner.computed(1) == new + 5  # all but the last token of the answer
    assert all(not row.pictures for plan in runner.plans for row in plan.rows if row.sequence_id == 1)
    assert after.prompt_tokens - before.prompt_tokens == len(turn_two)
    assert after.cached_tokens - before.cached_tokens == len(turn_two) - new
    assert again.ids == lone_run(model, replace(second, images=first.images))


def test_only_the_missing_picture_is_asked_for(model):
    driver = make_driver(model)
    driver.run(make_call(12, pictures=[("a", 2, 8)]))
    call = make_call(30, pictures=[("a", 2, 8), ("b", 14, 6), ("c", 22, 2), ("b", 24, 6)], with_vectors=False)
    sequence_id = driver.submit(call)
    assert driver.answers[sequence_id].needed == ["b", "c"]
    driver.finish()
    driver.engine.supply(sequence_id, "c", make_vectors("c", 2))
    driver.finish()
    assert driver.answers[sequence_id].ids == ()
    driver.engine.supply(sequence_id, "b", make_vectors("b", 6))
    driver.finish()
    answer = driver.answers[sequence_id]
    assert answer.needed == ["b", "c"]
    assert answer.prefill.kv_images == (0,)
    assert answer.ids == lone_run(model, call)


def test_late_vectors_and_aborts_are_taken_calmly(model):
    driver = make_driver(model)
    sequence_id = driver.submit(make_call(9))
    driver.finish()
    driver.engine.supply(sequence_id, "a", make_vectors("a", 4))
    driver.engine.abort(sequence_id)
    driver.engine.abort(12345)
    assert not driver.engine.has_work


# -- leaving and coming back --------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", range(9))
def test_an_abort_frees_everything_at_once(model, num_steps):
    driver = make_driver(model, max_step_tokens=5)
    doomed = driver.submit(make_call(14))
    other = make_call(9, seed=1)
    kept = driver.submit(other)
    for _ in range(num_steps):
        driver.step()
    before = driver.engine.stats().blocks_used
    driver.engine.abort(doomed)
    driver.engine.check_integrity()
    assert driver.engine.stats().blocks_used < before or num_steps == 0
    driver.finish()
    assert driver.answers[doomed].finish is None
    assert driver.answers[kept].ids == lone_run(model, other)
    assert driver.engine.stats().blocks_used == 0


@pytest.mark.parametrize("num_emitted", range(9))
@pytest.mark.parametrize("sampling", [None, replace(RANDOM, repetition_penalty=1.2, frequency_penalty=0.5)])
def test_another_engine_goes_on_where_one_stopped(model, num_emitted, sampling):
    call = make_call(12, sampling=sampling, **PICTURE)
    whole = lone_run(model, call)
    (answer,) = make_driver(model, max_step_tokens=5).run(replace(call, emitted=whole[:num_emitted]))
    assert answer.ids == whole[num_emitted:]
    assert answer.finish is FinishReason.LENGTH
    assert answer.prefill.num_prompt_tokens == 12


def test_a_finished_answer_is_only_ended(model):
    driver = make_driver(model)
    (stopped,) = driver.run(make_call(12, emitted=(4, 9), sampling=Sampling(0, stop_ids=(9,))))
    assert (stopped.ids, stopped.finish) == ((), FinishReason.STOP)
    assert not driver.engine.has_work


# -- numbers ------------------------------------------------------------------------------------------


def test_stats_add_up(model):
    driver = make_driver(model)
    call = make_call(18, max_tokens=5)
    driver.run(call, make_call(7, seed=1, max_tokens=3))
    driver.run(call)
    stats = driver.engine.stats()
    assert stats.prompt_tokens == 18 + 7 + 18
    assert stats.cached_tokens == 16
    assert stats.generated_tokens == 5 + 3 + 5
    assert stats.computed_tokens == (18 + 4) + (7 + 2) + (18 - 16 + 4)  # the last token of an answer is not computed
    assert stats.num_failed == 0
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_total == 64
    assert stats.num_steps == 5 + 5
    assert (stats.last_step_sequences, stats.last_step_tokens) == (1, 1)


def test_a_step_given_up_half_way_changes_no_token(model):
    driver = make_driver(model, max_step_tokens=8)
    calls = [make_call(6, seed=n, max_tokens=6, priority=Priority.BATCH) for n in range(3)]
    ids = [driver.submit(call) for call in calls]
    for _ in range(6):
        assert driver.step(ComesLate(make_call(6), num_asked=2)) == []  # in front of the second of two layers
        driver.step()
    driver.finish()
    assert [driver.answers[n].ids for n in ids] == [lone_run(model, call) for call in calls]
    assert driver.engine.stats().num_yielded == 6


def test_a_step_that_somebody_waits_for_is_never_given_up(model):
    driver = make_driver(model)
    driver.submit(make_call(6, max_tokens=4, priority=Priority.BATCH))
    driver.submit(make_call(6, seed=1, max_tokens=4))
    driver.step(ComesLate(make_call(6), num_asked=1))
    assert driver.engine.stats().num_yielded == 0
    assert driver.engine.stats().num_steps == 1
    driver.finish()


def test_waiting_is_counted_by_class(model):
    driver = make_driver(model, max_sequences=1)
    for n, priority in enumerate((Priority.ONLINE, Priority.BATCH, Priority.ONLINE, Priority.BATCH)):
        driver.submit(make_call(6, seed=n, priority=priority))
    driver.step()
    stats = driver.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 3)
    assert (stats.num_waiting_online, stats.num_waiting_batch) == (1, 2)
    driver.finish()


def test_queue_time_is_measured_to_the_first_start(model):
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    from engine_fakes import CONFIG, Driver

    from omnilmm.engine.engine import Engine
    from omnilmm.engine.runner import ModelRunner

    clock, config = Clock(), CONFIG.resolve(max_sequences=1)
    driver = Driver(Engine(ModelRunner(model, config), config, clock=clock))
    driver.submit(make_call(5, max_tokens=2))
    waiting = driver.submit(make_call(6, max_tokens=2))
    while driver.engine.has_work:
        driver.step()
        clock.now += 1.0
    assert driver.answers[waiting].prefill.queue_s == 2.0
