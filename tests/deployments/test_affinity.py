"""Where conversations go: alike for every caller, little moved by change, never piled up."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.affinity import rank

REPLICAS = [f"replica-{i}" for i in range(5)]
names = st.lists(st.text(min_size=1), min_size=1, max_size=8, unique=True)


@given(st.text(), names)
def test_every_caller_ranks_alike_in_whatever_order_it_knows_the_replicas(key, replicas):
    ranked = rank(key, replicas, {}, 1.25)
    assert ranked == rank(key, replicas[::-1], {}, 1.25)
    assert sorted(ranked) == sorted(replicas)


def test_conversations_spread_evenly():
    first = Counter(rank(f"conversation {i}", REPLICAS, {}, 1.25)[0] for i in range(5000))
    assert all(800 < first[replica] < 1200 for replica in REPLICAS)


def test_a_replica_that_goes_moves_only_its_own_conversations():
    for i in range(500):
        before = rank(f"conversation {i}", REPLICAS, {}, 1.25)
        after = rank(f"conversation {i}", REPLICAS[1:], {}, 1.25)
        assert after == [replica for replica in before if replica != REPLICAS[0]]


def test_a_replica_above_its_fair_load_is_passed_over_and_comes_last():
    home, second = rank("c", REPLICAS, {}, 1.25)[:2]
    load = {home: 10, **{replica: 1 for replica in REPLICAS if replica != home}}
    ranked = rank("c", REPLICAS, load, 1.25)
    assert ranked[0] == second
    assert ranked[-1] == home


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=200))
def test_no_replica_is_ever_loaded_beyond_the_bound(hot_keys):
    """Placing calls one after another, none of them ending, the fullest stays within 1.25 of the mean, rounded up."""
    load = Counter()
    for number, key in enumerate(hot_keys, start=1):
        load[rank(f"hot {key}", REPLICAS, load, 1.25)[0]] += 1
        assert max(load.values()) <= -(-1.25 * number // len(REPLICAS))
