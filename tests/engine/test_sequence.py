from __future__ import annotations

import pytest
from engine_fakes import make_call, make_vectors

from omnilmm.engine.sequence import FINISH_REASONS, Sequence, Status
from omnilmm.messages import FinishReason, Sampling


def make_sequence(*args, **fields) -> Sequence:
    return Sequence(7, make_call(*args, **fields), block_size=4, submitted_at=1.0)


def test_a_new_sequence_owes_everything():
    sequence = make_sequence(10)
    assert (sequence.num_tokens, sequence.num_owed, sequence.num_payable) == (10, 10, 10)
    assert sequence.status is Status.WAITING
    assert not sequence.status.is_finished


def test_a_missing_picture_limits_what_can_be_paid():
    sequence = make_sequence(12, pictures=[("a", 3, 4), ("b", 8, 2)], with_vectors=False)
    assert (sequence.num_ready, sequence.num_owed) == (3, 12)
    assert sequence.ready_after(7) == 8
    assert sequence.ready_after(5) == 5  # half a picture in the pool does not help
    sequence.pictures.supply("a", make_vectors("a", 4))
    assert sequence.num_ready == 8
    sequence.pictures.supply("b", make_vectors("b", 2))
    assert sequence.num_ready == 12


def test_rows_draw_only_at_the_end():
    sequence = make_sequence(10)
    sequence.start([5, 2, 9], 4, now=3.0)
    middle = sequence.row(3)
    assert (middle.start, middle.end, middle.num_tokens, middle.block_ids) == (4, 7, 3, (5, 2))
    assert middle.draw is None
    last = sequence.row(6)
    assert last.block_ids == (5, 2, 9)
    assert last.ids == tuple(sequence.ids[4:])
    assert last.draw is not None
    assert last.draw.position == 0


def test_penalties_get_what_they_look_at_and_nothing_else():
    plain = make_sequence(4, emitted=(9, 8))
    repeats = make_sequence(4, emitted=(9, 8), sampling=Sampling(0, repetition_penalty=1.2))
    counts = make_sequence(4, emitted=(9, 8), sampling=Sampling(0, presence_penalty=0.5))
    draws = []
    for sequence in (plain, repeats, counts):
        sequence.start([0, 1], 0, now=0.0)
        draws.append(sequence.row(6).draw)
    assert [draw.position for draw in draws] == [2, 2, 2]
    assert [draw.seen for draw in draws] == [(), (1, 9, 8), ()]
    assert [draw.generated for draw in draws] == [(), (), (9, 8)]


def test_prefill_is_told_once_and_speaks_of_the_first_start():
    sequence = make_sequence(10, pictures=[("a", 0, 4), ("b", 6, 3)])
    assert sequence.take_prefill() is None
    sequence.start([0, 1, 2], 8, now=3.5)
    assert sequence.stop(Status.WAITING) == [0, 1, 2]
    assert (sequence.num_computed, sequence.block_ids) == (0, [])
    sequence.start([3, 4, 5], 0, now=9.0)
    prefill = sequence.take_prefill()
    assert (prefill.num_prompt_tokens, prefill.num_cached_tokens) == (10, 8)
    assert prefill.kv_images == (0,)
    assert prefill.queue_s == 2.5
    assert sequence.take_prefill() is None


def test_the_end_comes_by_stop_id_or_length():
    stopped = make_sequence(4, max_tokens=3, sampling=Sampling(0, stop_ids=(50,)))
    long = make_sequence(4, max_tokens=2)
    for sequence, drawn in ((stopped, (7, 50)), (long, (7, 50))):
        sequence.start([0, 1], 0, now=0.0)
        for token_id in drawn:
            sequence.append(token_id)
    assert FINISH_REASONS[stopped.status] is FinishReason.STOP
    assert FINISH_REASONS[long.status] is FinishReason.LENGTH


def test_emitted_tokens_count_as_generated():
    sequence = make_sequence(4, max_tokens=3, emitted=(9, 8))
    assert (sequence.num_prompt, sequence.num_generated, sequence.num_owed) == (4, 2, 6)
    assert make_sequence(4, max_tokens=2, emitted=(9, 8)).status is Status.LENGTH
    assert make_sequence(4, emitted=(9,), sampling=Sampling(0, stop_ids=(9,))).status is Status.STOPPED
    assert make_sequence(4, max_tokens=0).status is Status.LENGTH


def test_digests_grow_with_the_ids_and_never_change():
    sequence = make_sequence(9)
    before = list(sequence.digests(2))
    sequence.start([0, 1, 2, 3], 0, now=0.0)
    for token_id in (5, 6, 7):
        sequence.append(token_id)
    assert list(sequence.digests(3))[:2] == before
    longer = make_sequence(sequence.ids)
    assert list(longer.digests(3)) == list(sequence.digests(3))
    with pytest.raises(AssertionError):
        sequence.digests(4)
