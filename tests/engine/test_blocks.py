from __future__ import annotations

import itertools

import pytest

from omnilmm.engine.blocks import BlockManager, PictureMark, block_digest, root_digest

ROOT = root_digest("tenant", None)


def digests(num_blocks: int, name: str = "a") -> list[bytes]:
    return [f"{name}{block}".encode() for block in range(num_blocks)]


def fill(blocks: BlockManager, num_blocks: int, name: str = "a") -> list[int]:
    """Blocks taken and published as the first ones of a sequence called `name`."""
    block_ids = blocks.take_blocks(num_blocks)
    for block_id, digest in zip(block_ids, digests(num_blocks, name), strict=True):
        blocks.publish(block_id, digest)
    return block_ids


def test_digest_tells_everything_apart():
    variants = [
        block_digest(ROOT, (1, 2, 3, 4), ()),
        block_digest(ROOT, (1, 2, 4, 3), ()),
        block_digest(ROOT, (1, 2, 3), ()),
        block_digest(root_digest("other", None), (1, 2, 3, 4), ()),
        block_digest(root_digest("tenant", "adapter"), (1, 2, 3, 4), ()),
        block_digest(root_digest("tenant", ""), (1, 2, 3, 4), ()),
        block_digest(block_digest(ROOT, (1, 2, 3, 4), ()), (1, 2, 3, 4), ()),
        *(
            block_digest(ROOT, (1, 2, 3, 4), marks)
            for marks in [
                (PictureMark("k", 0, 4),),
                (PictureMark("k", -1, 4),),
                (PictureMark("k", 0, 3),),
                (PictureMark("l", 0, 4),),
                (PictureMark("k", 0, 1), PictureMark("k", 1, 1)),
                (PictureMark("kk", 0, 4),),
            ]
        ),
    ]
    assert len(set(variants)) == len(variants)


def test_names_do_not_run_into_one_another():
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("abc", None)]
    assert len({root_digest(*pair) for pair in pairs}) == len(pairs)


def test_digests_are_the_same_in_every_process():
    assert root_digest("default", None).hex()[:16] == "a8be448e138b9810"
    assert block_digest(ROOT, (5, 6), (PictureMark("k", 1, 1),)).hex()[:16] == "08a23328d15348cb"


def test_odd_text_does_no_harm():
    assert root_digest("\ud800\x00", None) != root_digest("\ud801\x00", None)


def test_blocks_go_round():
    blocks = BlockManager(4, 2)
    first = blocks.take_blocks(3)
    assert blocks.num_held == 3
    assert blocks.can_take(1)
    assert not blocks.can_take(2)
    blocks.check_integrity([first])
    blocks.release_blocks(first)
    assert blocks.num_held == 0
    assert sorted(blocks.take_blocks(4)) == [0, 1, 2, 3]


def test_num_blocks_for_rounds_up():
    blocks = BlockManager(4, 4)
    assert [blocks.num_blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_prefix_is_found_as_long_as_it_is_kept():
    blocks = BlockManager(8, 2)
    held = fill(blocks, 3)
    assert blocks.find_prefix(digests(5)) == held
    blocks.release_blocks(held)
    assert blocks.find_prefix(digests(2)) == held[:2]
    assert blocks.find_prefix([b"other", *digests(3)]) == []


def test_asking_changes_nothing():
    blocks = BlockManager(3, 2)
    held = fill(blocks, 3)
    blocks.release_blocks(held)
    blocks.find_prefix(digests(3))
    blocks.can_take(3)
    blocks.can_take(1, beside=held[:1])
    assert blocks.num_held == 0
    blocks.check_integrity([])
    assert blocks.take_blocks(1) == held[-1:]  # still the first to go


def test_shared_blocks_count_their_holders():
    blocks = BlockManager(4, 2)
    held = fill(blocks, 2)
    blocks.share_blocks(held)
    blocks.release_blocks(held)
    assert blocks.num_held == 2
    blocks.check_integrity([held])
    blocks.release_blocks(held)
    assert blocks.num_held == 0


def test_can_take_counts_the_shared_ones():
    blocks = BlockManager(4, 2)
    cached = fill(blocks, 2)
    blocks.release_blocks(cached)
    assert blocks.can_take(4)
    assert blocks.can_take(2, beside=cached)
    assert not blocks.can_take(3, beside=cached)


def test_the_oldest_content_goes_first_and_the_unknown_before_it():
    blocks = BlockManager(6, 2)
    old, new, blank = fill(blocks, 2, "old"), fill(blocks, 2, "new"), blocks.take_blocks(2)
    for block_ids in (old, blank, new):
        blocks.release_blocks(block_ids)
    order = list(itertools.chain.from_iterable(blocks.take_blocks(1) for _ in range(6)))
    assert set(order[:2]) == set(blank)
    assert order[2:] == [old[1], old[0], new[1], new[0]]  # and of one sequence the end before the beginning


def test_being_used_makes_content_young():
    blocks = BlockManager(2, 2)
    first, second = fill(blocks, 1, "x"), fill(blocks, 1, "y")
    blocks.release_blocks(first)
    blocks.release_blocks(second)
    blocks.share_blocks(first)
    blocks.release_blocks(first)
    assert blocks.take_blocks(1) == second


def test_taking_a_cached_block_makes_it_unknown():
    blocks = BlockManager(1, 2)
    blocks.release_blocks(fill(blocks, 1))
    blocks.take_blocks(1)
    assert blocks.find_prefix(digests(1)) == []


def test_the_same_content_twice_keeps_the_first():
    blocks = BlockManager(2, 2)
    first, second = fill(blocks, 1), fill(blocks, 1)
    assert blocks.find_prefix(digests(1)) == first
    blocks.check_integrity([first, second])
    blocks.release_blocks(second)
    assert blocks.find_prefix(digests(1)) == first


def test_forgotten_content_is_not_found():
    blocks = BlockManager(2, 2)
    held = fill(blocks, 2)
    blocks.forget(held[1:])
    assert blocks.find_prefix(digests(2)) == held[:1]
    blocks.check_integrity([held])


def test_wrong_books_are_noticed():
    blocks = BlockManager(4, 2)
    held = blocks.take_blocks(2)
    for wrong in ([], [held, held], [[held[0], held[0]]], [[*held, 3]]):
        with pytest.raises(AssertionError):
            blocks.check_integrity(wrong)
    blocks.release_blocks(held)
    with pytest.raises(AssertionError):
        blocks.release_blocks(held)
    with pytest.raises(AssertionError):
        blocks.take_blocks(5)
