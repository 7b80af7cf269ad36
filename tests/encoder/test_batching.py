"""Batches are as large as pays: learnt from what the batches before them cost."""

from omnilmm.encoder.batching import TRY_AGAIN, BatchSizes


def learnt(seconds_of, max_batch=16):
    """Sizes after every size was measured, and a first batch before them that took as long as first batches do."""
    sizes = BatchSizes(max_batch)
    sizes.note(1, 100.0)
    for size in range(1, max_batch + 1):
        sizes.note(size, seconds_of(size))
    return sizes


def test_what_was_never_tried_is_tried():
    sizes = BatchSizes(8)
    assert sizes.choose(1) == 1
    for _ in range(2):
        sizes.note(1, 1.0)
    assert sizes.choose(5) == 5
    assert sizes.choose(100) == 8


def test_where_batching_saves_nothing_each_picture_goes_alone():
    sizes = learnt(lambda size: 1.0 * size)
    assert [sizes.choose(waiting) for waiting in (1, 2, 5, 16, 40)] == [1, 1, 1, 1, 1]


def test_where_batching_is_free_all_that_waits_goes_together():
    sizes = learnt(lambda size: 1.0)
    assert [sizes.choose(waiting) for waiting in (1, 2, 5, 16, 40)] == [1, 2, 5, 16, 16]


def test_a_batch_grows_no_further_than_it_pays():
    """Up to four pictures share a second; every further four cost another."""
    sizes = learnt(lambda size: max(1.0, size / 4))
    assert sizes.choose(16) == 7
    assert sizes.choose(3) == 3


def test_a_judgement_is_not_for_ever():
    sizes = learnt(lambda size: 1.0 * size)
    chosen = [sizes.choose(8) for _ in range(TRY_AGAIN)]
    assert chosen == [1] * (TRY_AGAIN - 1) + [8]
    for _ in range(20):
        sizes.note(8, 1.0)
    assert sizes.choose(8) == 8


def test_a_slow_first_picture_does_not_decide_that_pairs_pay():
    """Pictures that come in pairs to a process that just began, where a pair takes as long as two."""
    sizes, chosen = BatchSizes(8), []
    for seconds in (0.7, 0.51):
        sizes.note(1, seconds)
    for _ in range(6):
        size = sizes.choose(2)
        chosen.append(size)
        sizes.note(size, 0.515 * size)
    assert chosen == [2, 1, 1, 1, 1, 1]


def test_one_picture_is_measured_though_they_always_come_together():
    sizes, chosen = BatchSizes(8), []
    for _ in range(TRY_AGAIN + 3):
        size = sizes.choose(4)
        chosen.append(size)
        sizes.note(size, 1.0)  # together they cost no more
    assert chosen[:4] == [4, 4, 1, 4]
    assert chosen[4:].count(1) == 1
