"""Sixty conversations of five turns over three replicas, on paper: what affinity saves, and that it piles nothing up.

A replica prefills one prompt after another and decodes beside that. What of a prompt its KV pool holds from an earlier
turn need not be prefilled. A client asks its next question a while after the last one is answered, and meanwhile
another conversation may take its place. The same workload over a live cluster: tests/bench/affinity.py.
"""

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from deployments.affinity import rank

NUM_CONVERSATIONS, NUM_TURNS = 60, 5
ANSWER_TOKENS = 64
PREFILL_S, STEP_S = 1 / 2000, 0.03  # per token of a prompt, per token of an answer


@dataclass
class Fleet:
    """Replicas, the calls they hold, and the tokens of each conversation in their KV pools."""

    names: list[str]
    load: Counter = field(default_factory=Counter)
    held: Counter = field(default_factory=Counter)  # by (replica, conversation)
    homes: dict = field(default_factory=dict)  # of conversations: who answered last
    free_at: Counter = field(default_factory=Counter)  # when a replica's prefills are done


def by_affinity(key, fleet, draw):
    return rank(key, fleet.names, fleet.load, 1.25, fleet.homes.get(key))[0]


def by_power_of_two(key, fleet, draw):
    return min(draw.sample(fleet.names, 2), key=lambda name: fleet.load[name])


def simulate(route, *, num_replicas, concurrency, pause_s, seed):
    """Share of prompt tokens found in KV, and the sorted times to the first token in seconds."""
    draw = random.Random(seed)
    fleet = Fleet([f"replica {i} of run {seed}" for i in range(num_replicas)])
    lengths = [
        [draw.randint(100, 180), *(draw.randint(30, 70) for _ in range(NUM_TURNS - 1))]
        for _ in range(NUM_CONVERSATIONS)
    ]
    waiting = list(range(NUM_CONVERSATIONS))
    events = [(0.5 * draw.random(), number, waiting.pop(), 0, None) for number in range(concurrency)]
    heapq.heapify(events)
    num_cached = num_prompt = 0
    ttfts = []
    while events:
        now, number, conversation, turn, done_by = heapq.heappop(events)
        if done_by is not None:  # an answer is complete
            fleet.load[done_by] -= 1
            now += pause_s * draw.expovariate(1)
            if turn + 1 < NUM_TURNS:
                heapq.heappush(events, (now, number, conversation, turn + 1, None))
            elif waiting:
                heapq.heappush(events, (now, number, waiting.pop(), 0, None))
            continue
        key = f"conversation {conversation}"
        name = fleet.homes[key] = route(key, fleet, draw)
        fleet.load[name] += 1
        length = sum(lengths[conversation][: turn + 1]) + turn * ANSWER_TOKENS
        cached = min(fleet.held[name, conversation], length - 1)
        prefilled = max(now, fleet.free_at[name]) + (length - cached) * PREFILL_S
        fleet.free_at[name] = prefilled
        fleet.held[name, conversation] = length + ANSWER_TOKENS
        ttfts.append(prefilled + STEP_S - now)
        answered = prefilled + ANSWER_TOKENS * STEP_S * (1 + 0.05 * fleet.load[name])
        heapq.heappush(events, (answered, number, conversation, turn, name))
        num_cached, num_prompt = num_cached + cached, num_prompt + length
    assert not +fleet.load
    assert len(ttfts) == NUM_CONVERSATIONS * NUM_TURNS
    return num_cached / num_prompt, sorted(ttfts)


def mean_of_runs(route, num_replicas, **workload):
    """Hit rate and p99 of the time to the first token."""
    runs = [simulate(route, num_replicas=num_replicas, **workload, seed=seed) for seed in range(8)]
    return sum(hits for hits, _ in runs) / 8, sum(ttfts[int(0.99 * len(ttfts))] for _, ttfts in runs) / 8


@pytest.mark.parametrize("pause_s", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("concurrency", [4, 12, 24])
def test_three_replicas_find_nearly_what_one_would_and_nobody_waits_longer(concurrency, pause_s):
    workload = {"concurrency": concurrency, "pause_s": pause_s}
    alone, _ = mean_of_runs(by_affinity, 1, **workload)
    hits, p99 = mean_of_runs(by_affinity, 3, **workload)
    blind_hits, blind_p99 = mean_of_runs(by_power_of_two, 3, **workload)
    assert hits >= 0.95 * alone
    assert blind_hits < 0.7 * alone, "the workload tells the two apart"
    assert p99 <= blind_p99


@pytest.mark.parametrize("num_replicas", [3, 8])
def test_a_replica_that_comes_takes_its_share_and_moves_nothing_else(num_replicas):
    names = [f"replica {i}" for i in range(num_replicas)]
    moved = 0
    for i in range(2000):
        before = rank(f"conversation {i}", names, {}, 1.25)[0]
        after = rank(f"conversation {i}", [*names, "new"], {}, 1.25)[0]
        assert after in (before, "new")
        moved += after == "new"
    assert moved / 2000 == pytest.approx(1 / (num_replicas + 1), rel=0.2)
