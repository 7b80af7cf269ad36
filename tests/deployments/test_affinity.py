"""Where conversations go: alike for every caller, little moved by change, never piled up."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.affinity import HOME_ROOM, places, rank, with_adapter

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


def test_a_conversation_stays_where_it_was_until_that_replica_is_far_too_full():
    first, second = rank("c", REPLICAS, {}, 1.25)[:2]
    ranked = rank("c", REPLICAS, {}, 1.25, home=second)
    assert ranked[:2] == [second, first]
    assert sorted(ranked) == REPLICAS
    # Five replicas, 19 or 20 calls with this one: the bound is 5.
    load = dict.fromkeys(REPLICAS, 3) | {second: 5 + HOME_ROOM - 1}
    assert rank("c", REPLICAS, load, 1.25)[0] == first
    assert rank("c", REPLICAS, load, 1.25, home=second)[0] == second
    load[second] += 1
    assert rank("c", REPLICAS, load, 1.25, home=second)[0] == first


def test_a_home_that_is_gone_is_forgotten():
    assert rank("c", REPLICAS, {}, 1.25, home="gone") == rank("c", REPLICAS, {}, 1.25)


def test_a_conversation_with_an_adapter_is_another_than_without():
    homes = Counter(
        rank(with_adapter("a", f"c{i}"), REPLICAS, {}, 1.25)[0] == rank(f"c{i}", REPLICAS, {}, 1.25)[0]
        for i in range(200)
    )
    assert 10 < homes[True] < 90
    assert with_adapter("a", "c") != with_adapter("b", "c")


def test_adapters_that_all_fit_keep_to_no_replica():
    assert sorted(places("a", REPLICAS, 8, 8, 1.25)) == REPLICAS
    assert sorted(places("a", REPLICAS, 0, 8, 1.25)) == REPLICAS


def test_more_adapters_keep_to_as_many_replicas_as_there_is_room_for():
    loaded = Counter(replica for i in range(20) for replica in places(f"adapter {i}", REPLICAS, 20, 8, 1.25))
    assert max(loaded.values()) <= 8
    assert all(len(places(f"adapter {i}", REPLICAS, 1000, 8, 1.25)) == 1 for i in range(20))


def test_what_an_adapter_keeps_to_with_many_it_keeps_to_with_few():
    for count in range(9, 60):
        more, fewer = places("a", REPLICAS, count + 1, 8, 1.25), places("a", REPLICAS, count, 8, 1.25)
        assert fewer[: len(more)] == more


def test_an_adapter_s_replicas_come_first_below_the_bound_and_only_there():
    first = places("a", REPLICAS, 20, 8, 1.25)[:1]
    for i in range(50):
        key = with_adapter("a", f"c{i}")
        ranked = rank(key, REPLICAS, {}, 1.25, preferred=first)
        assert ranked[0] == first[0]
        assert [r for r in ranked if r not in first] == [r for r in rank(key, REPLICAS, {}, 1.25) if r not in first]
        full = dict.fromkeys(REPLICAS, 1) | {first[0]: 9}
        assert rank(key, REPLICAS, full, 1.25, preferred=first)[-1] == first[0]


def test_bounded_load_holds_for_one_hot_adapter():
    load = Counter()
    preferred = places("a", REPLICAS, 20, 8, 1.25)
    for number in range(1, 200):
        key = with_adapter("a", f"c{number}")
        load[rank(key, REPLICAS, load, 1.25, preferred=preferred)[0]] += 1
        assert max(load.values()) <= -(-1.25 * number // len(REPLICAS))
