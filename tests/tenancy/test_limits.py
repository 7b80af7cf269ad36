"""The leaky buckets against a model that computes with fractions, in this process and inside Redis."""

from __future__ import annotations

import asyncio
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tenancy_fakes import HandClock, SteadyRedis

from omnilmm.tenancy.limits import SWEEP_ABOVE, Correction, Demand, LocalLimits
from omnilmm.tenancy.shared_limits import SharedLimits

LIMIT = 60  # a minute: one a second, so that whole seconds give whole levels
SECONDS = st.integers(0, 50)
COSTS = st.integers(1, 70)


def demand(cost, bucket="tokens", limit=LIMIT):
    return Demand(bucket, limit, 60.0, cost)


def over(surplus, bucket="tokens", limit=LIMIT):
    return Correction(bucket, limit, 60.0, surplus)


class Model:
    """One bucket, told in the simplest way: every whole second one token drains."""

    def __init__(self):
        self.level = Fraction(0)

    def pass_time(self, seconds):
        self.level = max(Fraction(0), self.level - seconds)

    def try_pour(self, cost):
        if self.level + cost > LIMIT:
            return False
        self.level += cost
        return True


def check_admissions(admit, clock, steps):
    model = Model()
    poured = []
    for number, (seconds, cost) in enumerate(steps):
        clock.now += seconds
        model.pass_time(seconds)
        decision = admit(f"p{number}", [demand(cost)])
        assert decision.admitted == model.try_pour(cost)
        assert decision.levels["tokens"] == model.level
        if decision.admitted:
            poured.append((clock.now, cost))
    for begin, _ in poured:  # what the rule promises: a burst of one minute's worth, and the rate from then on
        for end, _ in poured:
            assert sum(cost for at, cost in poured if begin <= at <= end) <= LIMIT + max(0, end - begin)


@given(st.lists(st.tuples(SECONDS, COSTS), max_size=40))
def test_a_bucket_does_what_the_model_does(steps):
    clock = HandClock()
    limits = LocalLimits(clock)
    check_admissions(lambda permit, asked: limits.admit("a", permit, asked, max_running=None), clock, steps)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(SECONDS, COSTS), max_size=25))
def test_redis_does_what_the_model_does(redis, steps):
    redis.flushall()
    clock = HandClock()
    limits = SharedLimits(SteadyRedis(redis, clock))
    check_admissions(
        lambda permit, asked: asyncio.run(limits.admit("a", permit, asked, max_running=None)), clock, steps
    )


REQUESTS = st.lists(st.tuples(SECONDS, COSTS, st.integers(0, 90), st.integers(0, 120)), min_size=1, max_size=12)


@given(REQUESTS)
@example([(0, 60, 0, 60), (0, 60, 60, 1)])  # a reservation that had drained before it was given back
def test_a_correction_never_forgives_more_than_the_truth_would(requests):
    """`real` is a bucket in which the true cost was poured when the request came. Ours must never be below it."""
    clock = HandClock()
    limits = LocalLimits(clock)
    begun = [(sum(gap for gap, *_ in requests[: i + 1]), *request[1:]) for i, request in enumerate(requests)]
    events = sorted(
        [(at, 0, i) for i, (at, *_) in enumerate(begun)]
        + [(at + lasts, 1, i) for i, (at, _, _, lasts) in enumerate(begun)]
    )
    real, running, then = Fraction(0), {}, 0
    truths = []  # (when, true cost) of all admitted, replayed to know the real level at any time

    def real_level(now):
        level, last = Fraction(0), 0
        for at, cost in truths:
            level = max(Fraction(0), level - (at - last)) + cost
            last = at
        return max(Fraction(0), level - (now - last))

    for now, is_end, i in events:
        clock.now += now - then
        then = now
        _, reserved, true, _ = begun[i]
        if not is_end:
            decision = limits.admit("a", f"p{i}", [demand(reserved)], max_running=None)
            if decision.admitted:
                running[i] = decision.at
                truths.append((now, min(reserved, true)))
        elif i in running:
            limits.settle("a", f"p{i}", running.pop(i), [over(reserved - true)])
            if true > reserved:
                truths.append((now, true - reserved))
        real = real_level(now)
        if not running:
            ours = limits.admit("a", "probe", [demand(0)], max_running=None).levels["tokens"]
            limits.settle("a", "probe", clock.now, [])
            assert ours >= real
    assert limits.num_running == 0


@given(st.integers(1, 60), st.integers(0, 200))
def test_a_correction_at_once_is_exact(reserved, true):
    clock = HandClock()
    limits = LocalLimits(clock)
    decision = limits.admit("a", "p", [demand(reserved)], max_running=None)
    limits.settle("a", "p", decision.at, [over(reserved - true)])
    assert limits.admit("a", "q", [demand(0)], max_running=None).levels["tokens"] == true


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 40)),
        st.tuples(st.just("settle"), st.integers(0, 9), st.integers(-30, 30)),
        st.tuples(st.just("wait"), st.integers(0, 25)),
    ),
    max_size=30,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(STEPS)
@example([("admit", "a", 40, 40), ("wait", 25), ("admit", "a", 40, 40), ("settle", 0, 30), ("admit", "a", 1, 1)])
def test_redis_and_the_local_books_agree(redis, steps):
    """The two forms of one rule: two tenants, two buckets, at most three requests at once, corrections."""
    redis.flushall()
    clock = HandClock()
    local, shared = LocalLimits(clock), SharedLimits(SteadyRedis(redis, clock), lease_s=1e6)
    running = []

    async def play():
        for number, step in enumerate(steps):
            if step[0] == "wait":
                clock.now += step[1]
            elif step[0] == "admit":
                _, tenant, tokens, pixels = step
                asked = [demand(tokens), demand(pixels, "pixels", 120)]
                here = local.admit(tenant, f"p{number}", asked, max_running=3)
                there = await shared.admit(tenant, f"p{number}", asked, max_running=3)
                assert (here.admitted, here.is_crowded) == (there.admitted, there.is_crowded)
                assert there.levels == pytest.approx(here.levels, abs=1e-6)
                if here.admitted:
                    running.append((tenant, f"p{number}", here.at, there.at))
            elif running:
                tenant, permit, here_at, there_at = running.pop(step[1] % len(running))
                truth = [over(step[2]), over(-step[2], "pixels", 120)]
                local.settle(tenant, permit, here_at, truth)
                await shared.settle(tenant, permit, there_at, truth)

    asyncio.run(play())


@pytest.fixture(params=["local", "redis"])
def admit(request, clock):
    """One rule, two books; the fixture gives `admit(permit, demands, max_running=None)`."""
    if request.param == "local":
        limits = LocalLimits(clock)
        return lambda permit, asked, most=None: limits.admit("acme", permit, asked, max_running=most)
    shared = SharedLimits(SteadyRedis(request.getfixturevalue("redis"), clock))
    return lambda permit, asked, most=None: asyncio.run(shared.admit("acme", permit, asked, max_running=most))


def test_all_buckets_or_none(admit):
    assert admit("p1", [demand(1, "requests", 10), demand(50)]).admitted
    refused = admit("p2", [demand(1, "requests", 10), demand(20)])
    assert not refused.admitted
    assert refused.levels == {"requests": 1, "tokens": 50}
    assert admit("p3", [demand(1, "requests", 10), demand(10)]).levels == {"requests": 2, "tokens": 60}


def test_too_many_at_once_pours_nothing(admit):
    assert admit("p1", [demand(1)], 1).admitted
    crowded = admit("p2", [demand(1)], 1)
    assert crowded.is_crowded
    assert not crowded.admitted
    assert crowded.levels == {"tokens": 1}


def test_a_limit_that_changes_keeps_the_level(admit, clock):
    admit("p1", [demand(30)])
    assert not admit("p2", [demand(1, limit=20)]).admitted
    assert admit("p3", [demand(1, limit=600)]).levels == {"tokens": 31}
    clock.now += 1
    assert admit("p4", [demand(0, limit=600)]).levels == {"tokens": 21}


def test_a_share_smaller_than_a_request_keeps_the_rate(clock):
    limits = LocalLimits(clock)

    def ask(permit):
        return limits.admit("a", permit, [demand(30)], max_running=2, share=0.25)

    assert ask("p1").admitted  # 15 tokens a minute are ours: this overflows the bucket
    assert not ask("p2").admitted
    limits.settle("a", "p1", clock.now, [])
    clock.now += 119
    assert not ask("p3").admitted
    clock.now += 1
    assert ask("p4").admitted
    assert not limits.admit("a", "p5", [demand(61)], max_running=None, share=0.25).admitted


# -- what only the books of one process have ----------------------------------------------------------


def test_buckets_that_have_drained_are_forgotten(clock):
    limits = LocalLimits(clock)
    num_tenants = 10 * SWEEP_ABOVE
    for number in range(num_tenants):
        asked = [demand(1, "requests"), demand(30)]
        decision = limits.admit(f"tenant {number}", "p", asked, max_running=None)
        limits.settle(f"tenant {number}", "p", decision.at, [over(10)])
        clock.now += 1  # 20 tokens are gone in 20 seconds, so there are never more than some twenty that mean anything
    assert limits.num_buckets <= SWEEP_ABOVE
    levels = limits.admit(f"tenant {num_tenants - 5}", "q", [demand(0)], max_running=None).levels
    assert levels == {"tokens": 15}, "what has not drained is still known"


def test_a_bucket_that_is_given_back_whole_is_not_kept(clock):
    limits = LocalLimits(clock)
    decision = limits.admit("a", "p", [demand(30)], max_running=None)
    limits.settle("a", "p", decision.at, [over(30)])
    assert limits.num_buckets == 0


def test_of_too_many_buckets_those_that_would_be_empty_soonest_go(clock):
    limits = LocalLimits(clock, max_buckets=16)

    def level(tenant):
        return limits.admit(tenant, "probe", [demand(0)], max_running=None).levels["tokens"]

    assert limits.admit("heavy", "p", [demand(60)], max_running=None).admitted
    for number in range(1000):
        assert limits.admit(f"light {number}", "p", [demand(1 + number % 5)], max_running=None).admitted
        assert limits.num_buckets <= 16
    assert level("heavy") == 60, "it still has to wait"
    assert not limits.admit("heavy", "q", [demand(1)], max_running=None).admitted
    assert sum(level(f"light {number}") > 0 for number in range(1000)) <= 15


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 400), COSTS), max_size=60))
def test_to_forget_drained_buckets_changes_no_decision(steps):
    """As many tenants as there is room for, against books that never sweep."""
    clock = HandClock()
    tidy, hoarder = LocalLimits(clock, max_buckets=28), LocalLimits(clock)
    for number, (seconds, who, cost) in enumerate(steps):
        clock.now += seconds
        tidy._sweep(clock.now)
        asked = [demand(cost)]
        here, there = (books.admit(f"t{who % 20}", f"p{number}", asked, max_running=None) for books in (tidy, hoarder))
        assert (here.admitted, here.levels) == (there.admitted, pytest.approx(there.levels))


# -- what only the books in Redis have ----------------------------------------------------------------


async def test_leases_of_a_dead_router_lapse_and_those_of_a_living_one_are_renewed(redis, clock):
    shared = SharedLimits(SteadyRedis(redis, clock), lease_s=30)
    for permit in ("dead", "living"):
        assert (await shared.admit("a", permit, [], max_running=2)).admitted
    assert (await shared.admit("a", "third", [], max_running=2)).is_crowded
    clock.now += 20
    await shared.renew("a", ["living"])
    clock.now += 20
    assert (await shared.admit("a", "third", [], max_running=2)).admitted
    assert (await shared.admit("a", "fourth", [], max_running=2)).is_crowded


async def test_a_renewal_brings_back_what_an_empty_server_forgot(redis, clock):
    shared = SharedLimits(SteadyRedis(redis, clock))
    await shared.admit("a", "p", [], max_running=1)
    redis.flushall()
    await shared.renew("a", ["p"])
    assert (await shared.admit("a", "q", [], max_running=1)).is_crowded


async def test_a_clock_set_back_locks_nobody_out(redis, clock):
    shared = SharedLimits(SteadyRedis(redis, clock))
    await shared.admit("a", "p", [demand(60)], max_running=1)
    clock.now -= 600
    assert not (await shared.admit("a", "q", [demand(30)], max_running=None)).admitted
    clock.now += 30
    assert (await shared.admit("a", "q", [demand(30)], max_running=1)).admitted  # the lease from the future is gone too


async def test_nothing_outlives_its_meaning(redis, clock):
    shared = SharedLimits(SteadyRedis(redis, clock), lease_s=30)
    decision = await shared.admit("a", "p", [demand(30), demand(1, "requests", 600)], max_running=5)
    levels, running = "omni:limits:{a}:levels", "omni:limits:{a}:running"
    assert 29_000 < redis.pttl(levels) <= 31_000  # 30 of 60 a minute drain in half a minute
    assert 29_000 < redis.pttl(running) <= 31_000
    await shared.settle("a", "p", decision.at, [over(30)])
    assert redis.exists(running) == 0
    redis.delete(levels)
    await shared.settle("a", "p", decision.at, [over(30)])
    assert 0 < redis.pttl(levels) <= 1000


@pytest.mark.parametrize("reply", [None, [], b"HTTP/1.1 400", [1, 0, b"x", b"y"], [1, 0], 7])
async def test_what_is_no_answer_of_ours_counts_as_none(reply):
    class Stranger:
        async def run(self, script, keys, args):
            return reply

    assert await SharedLimits(Stranger()).admit("a", "p", [demand(1)], max_running=None) is None
