from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from omnilmm.cache.memory import ENTRY_BYTES, MemoryTier


def test_the_least_recently_used_leaves_first() -> None:
    tier: MemoryTier[str] = MemoryTier(3 * (ENTRY_BYTES + 100))
    for name in ("a", "b", "c"):
        assert tier.put(name, name.upper(), 100)
    assert tier.get("a") == "A"
    assert tier.put("d", "D", 100)
    assert [tier.get(name) for name in "abcd"] == ["A", None, "C", "D"]
    assert (tier.num_hits, tier.num_misses, tier.num_evicted) == (4, 1, 1)
    tier.check_integrity()


def test_a_value_bigger_than_the_tier_is_not_kept_and_evicts_nobody() -> None:
    tier: MemoryTier[str] = MemoryTier(2 * ENTRY_BYTES)
    assert tier.put("a", "A", 10)
    assert not tier.put("b", "B", 2 * ENTRY_BYTES)
    assert tier.get("a") == "A"
    assert tier.get("b") is None


def test_no_bytes_keep_nothing() -> None:
    tier: MemoryTier[str] = MemoryTier(0)
    assert not tier.put("a", "A", 0)
    assert len(tier) == 0
    tier.check_integrity()


def test_a_second_put_replaces() -> None:
    tier: MemoryTier[str] = MemoryTier(10 * ENTRY_BYTES)
    tier.put("a", "old", 100)
    tier.put("a", "new", 50)
    assert tier.take("a") == "new"
    assert tier.take("a") is None
    assert tier.num_bytes == 0


class Books(RuleBasedStateMachine):
    """Whatever is done, the bytes are counted right and stay in bounds, and what is there is what was put last."""

    def __init__(self) -> None:
        super().__init__()
        self.tier: MemoryTier[int] = MemoryTier(6 * ENTRY_BYTES)
        self.last: dict[str, int] = {}

    @rule(key=st.sampled_from("abcdefgh"), value=st.integers(), num_bytes=st.integers(0, 7 * ENTRY_BYTES))
    def put(self, key: str, value: int, num_bytes: int) -> None:
        if self.tier.put(key, value, num_bytes):
            self.last[key] = value
        else:
            self.last.pop(key, None)

    @rule(key=st.sampled_from("abcdefgh"))
    def get(self, key: str) -> None:
        assert self.tier.get(key) in (None, self.last.get(key))

    @rule(key=st.sampled_from("abcdefgh"))
    def take(self, key: str) -> None:
        assert self.tier.take(key) in (None, self.last.pop(key, None))

    @invariant()
    def adds_up(self) -> None:
        self.tier.check_integrity()


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, deadline=None)


@settings(deadline=None)
@given(st.lists(st.integers(0, 100)))
def test_what_was_put_last_is_there_if_it_fits(sizes: list[int]) -> None:
    tier: MemoryTier[int] = MemoryTier(ENTRY_BYTES + 100)
    for number, size in enumerate(sizes):
        assert tier.put(str(number), number, size)
        assert tier.get(str(number)) == number
        assert len(tier) == 1
