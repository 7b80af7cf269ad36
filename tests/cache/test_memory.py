from __future__ import annotations

import random
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from omnilmm.cache.memory import ENTRY_BYTES, MemoryTier


def test_of_equals_the_least_recently_used_leaves_first() -> None:
    for seconds in (0.0, 0.5):
        tier: MemoryTier[str] = MemoryTier(3 * (ENTRY_BYTES + 100))
        for name in ("a", "b", "c"):
            assert tier.put(name, name.upper(), 100, seconds=seconds)
        assert tier.get("a") == "A"
        assert tier.put("d", "D", 100, seconds=seconds)
        assert [tier.get(name) for name in "abcd"] == ["A", None, "C", "D"]
        assert (tier.num_hits, tier.num_misses, tier.num_evicted) == (4, 1, 1)
        tier.check_integrity()


def test_what_is_dear_to_make_stays_longer_than_what_is_cheap() -> None:
    tier: MemoryTier[str] = MemoryTier(2 * (ENTRY_BYTES + 100))
    tier.put("dear", "", 100, seconds=2.0)
    tier.put("cheap", "", 100, seconds=0.1)
    tier.put("new", "", 100, seconds=0.1)
    assert tier.get("dear") is not None
    assert tier.get("cheap") is None


def test_what_takes_much_room_leaves_before_what_takes_little() -> None:
    tier: MemoryTier[str] = MemoryTier(2 * ENTRY_BYTES + 10_100)
    tier.put("small", "", 100, seconds=1.0)
    tier.put("big", "", 10_000, seconds=1.0)
    tier.put("new", "", 100, seconds=1.0)
    assert tier.get("small") is not None
    assert tier.get("big") is None


def test_what_is_asked_for_often_stays_longer_than_what_was_asked_for_last() -> None:
    tier: MemoryTier[str] = MemoryTier(2 * ENTRY_BYTES)
    tier.put("often", "", 0, seconds=1.0)
    for _ in range(3):
        tier.get("often")
    tier.put("once", "", 0, seconds=1.0)
    tier.put("new", "", 0, seconds=1.0)
    assert tier.get("often") is not None
    assert tier.get("once") is None


def test_even_the_dearest_leaves_in_the_end_when_nobody_asks_for_it() -> None:
    tier: MemoryTier[str] = MemoryTier(4 * ENTRY_BYTES)
    tier.put("dear", "", 0, seconds=10.0)
    for number in range(100):
        tier.put(f"cheap {number}", "", 0, seconds=1.0)
    assert tier.get("dear") is None


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
    tier.put("a", "old", 100, seconds=5.0)
    tier.put("a", "new", 50)
    assert tier.take("a") == "new"
    assert tier.take("a") is None
    assert tier.num_bytes == 0


def test_uses_without_end_take_no_room() -> None:
    tier: MemoryTier[str] = MemoryTier(10 * ENTRY_BYTES)
    tier.put("a", "A", 0, seconds=1.0)
    for _ in range(1000):
        tier.get("a")
    tier.check_integrity()  # it counts the marks


def test_on_a_skewed_trace_it_saves_more_seconds_than_recency_alone() -> None:
    """Pictures of two models, one ten times as dear per byte, asked for by Zipf's law; room for a fifth of them."""
    draw = random.Random(7)
    names = [f"picture {number}" for number in range(200)]
    weights = list(accumulate(1 / rank for rank in range(1, 201)))
    seconds = {name: draw.choice((0.2, 2.0)) for name in names}
    trace = draw.choices(names, cum_weights=weights, k=4000)

    def saved(known: bool) -> float:
        tier: MemoryTier[str] = MemoryTier(40 * (ENTRY_BYTES + 1000))
        total = 0.0
        for name in trace:
            if tier.get(name) is not None:
                total += seconds[name]
            else:
                tier.put(name, name, 1000, seconds=seconds[name] if known else 0.0)
        return total

    assert saved(known=True) > 1.1 * saved(known=False)


class Reference:
    """The definition written down naively: every worth in a list, and a search for the least at each eviction."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.clock, self.time = max_bytes, 0.0, 0
        self.entries: dict[str, dict] = {}

    def use(self, key: str) -> None:
        entry = self.entries[key]
        self.time += 1
        entry["uses"] += 1
        entry["last"] = self.time
        entry["worth"] = self.clock + entry["uses"] * entry["seconds"] / entry["bytes"]

    def get(self, key: str) -> int | None:
        if key not in self.entries:
            return None
        self.use(key)
        return self.entries[key]["value"]

    def put(self, key: str, value: int, num_bytes: int, seconds: float) -> bool:
        self.entries.pop(key, None)
        size = num_bytes + ENTRY_BYTES
        if size > self.max_bytes:
            return False
        while sum(entry["bytes"] for entry in self.entries.values()) + size > self.max_bytes:
            least = min(self.entries, key=lambda name: (self.entries[name]["worth"], self.entries[name]["last"]))
            self.clock = self.entries.pop(least)["worth"]
        self.entries[key] = {"value": value, "bytes": size, "seconds": seconds, "uses": 0}
        self.use(key)
        return True


class AgainstTheDefinition(RuleBasedStateMachine):
    """Whatever is done, the tier holds exactly what the definition holds, and its books are right."""

    def __init__(self) -> None:
        super().__init__()
        self.tier: MemoryTier[int] = MemoryTier(6 * ENTRY_BYTES)
        self.model = Reference(6 * ENTRY_BYTES)

    @rule(
        key=st.sampled_from("abcdefgh"),
        value=st.integers(),
        num_bytes=st.integers(0, 7 * ENTRY_BYTES),
        seconds=st.sampled_from([0.0, 0.001, 0.5, 3.0]),
    )
    def put(self, key: str, value: int, num_bytes: int, seconds: float) -> None:
        kept = self.tier.put(key, value, num_bytes, seconds=seconds)
        assert kept == self.model.put(key, value, num_bytes, seconds)

    @rule(key=st.sampled_from("abcdefgh"))
    def get(self, key: str) -> None:
        assert self.tier.get(key) == self.model.get(key)

    @rule(key=st.sampled_from("abcdefgh"))
    def take(self, key: str) -> None:
        entry = self.model.entries.pop(key, None)
        assert self.tier.take(key) == (None if entry is None else entry["value"])

    @invariant()
    def holds_the_same(self) -> None:
        self.tier.check_integrity()
        assert len(self.tier) == len(self.model.entries)
        assert self.tier.num_bytes == sum(entry["bytes"] for entry in self.model.entries.values())


TestAgainstTheDefinition = AgainstTheDefinition.TestCase
TestAgainstTheDefinition.settings = settings(max_examples=80, deadline=None)


@settings(deadline=None)
@given(st.lists(st.integers(0, 100)))
def test_what_was_put_last_is_there_if_it_fits(sizes: list[int]) -> None:
    tier: MemoryTier[int] = MemoryTier(ENTRY_BYTES + 100)
    for number, size in enumerate(sizes):
        assert tier.put(str(number), number, size)
        assert tier.get(str(number)) == number
        assert len(tier) == 1
