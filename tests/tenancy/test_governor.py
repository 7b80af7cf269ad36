"""At the door: who is let in, what they are told, and what it costs them in the end."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import replace

import pytest
from tenancy_fakes import SteadyRedis

from omnilmm.errors import Overloaded
from omnilmm.messages import ImageSource, ImageUsage, Usage
from omnilmm.tenancy.governor import Estimate, Governor
from omnilmm.tenancy.shared_limits import SharedLimits
from omnilmm.tenancy.standing import LimitReached, spell_duration
from omnilmm.tenancy.tenant import Tenant, TenantLimits


def tenant(**limits):
    return Tenant("acme", "acme", limits=TenantLimits(**limits))


def usage(tokens, *, pictures=(), kept=0):
    images = tuple(ImageUsage(ImageSource.ENCODED, 64, *size) for size in pictures)
    return Usage(tokens - 1, 1, cached_tokens=0, image_tokens=0, images=images, kept_bytes=kept)


@pytest.fixture
def steady(redis, clock):
    return SteadyRedis(redis, clock)


@pytest.fixture(params=["alone", "shared"])
async def governor(request, clock):
    shared = SharedLimits(request.getfixturevalue("steady")) if request.param == "shared" else None
    governor = Governor(clock, shared)
    yield governor
    await governor.aclose()
    governor.check_integrity()


async def remaining(governor, asking):
    """Requests and tokens left, without using any."""
    with await governor.admit(
        replace(asking, limits=replace(asking.limits, requests_per_min=None)), Estimate()
    ) as permit:
        return int(dict(permit.headers)["x-ratelimit-remaining-tokens"])


async def test_a_tenant_without_limits_costs_nothing(clock, steady):
    governor = Governor(clock, SharedLimits(steady))
    with await governor.admit(tenant(), Estimate(10**9, 10**9)) as permit:
        assert permit.headers == ()
        assert permit.may_cache
        permit.settle(usage(5))
    governor.check_integrity()
    assert steady.num_runs == 0


async def test_the_headers_are_openai_s(governor, clock):
    acme = tenant(requests_per_min=10, tokens_per_min=6000, concurrent_requests=5)
    with await governor.admit(acme, Estimate(tokens=100)) as permit:
        assert permit.headers == (
            ("x-ratelimit-limit-requests", "10"),
            ("x-ratelimit-remaining-requests", "9"),
            ("x-ratelimit-reset-requests", "6s"),
            ("x-ratelimit-limit-tokens", "6000"),
            ("x-ratelimit-remaining-tokens", "5900"),
            ("x-ratelimit-reset-tokens", "1s"),
        )
        permit.settle(usage(100))


@pytest.mark.parametrize(
    ("seconds", "spelt"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (60, "1m0s"),
        (72.172, "1m12.172s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90061.5, "25h1m1.5s"),
    ],
)
def test_durations_are_spelt_as_go_spells_them(seconds, spelt):
    assert spell_duration(seconds) == spelt


async def test_a_refusal_says_what_when_and_which(governor, clock):
    acme = tenant(tokens_per_min=60, requests_per_min=100)
    with await governor.admit(acme, Estimate(tokens=60)) as permit:
        permit.settle(usage(60))
    with pytest.raises(LimitReached) as caught:
        await governor.admit(acme, Estimate(tokens=7))
    error = caught.value
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "tokens")
    assert error.retry_after == 7
    assert error.message == (
        "Rate limit reached on tokens per min (TPM): Limit 60, Used 60, Requested 7. Please try again in 7s."
    )
    headers = dict(error.headers)
    assert headers["retry-after-ms"] == "7000"
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert headers["x-ratelimit-reset-tokens"] == "1m0s"
    assert headers["x-ratelimit-remaining-requests"] == "99"  # a refused request is not counted
    clock.now += 7
    with await governor.admit(acme, Estimate(tokens=7)) as permit:
        permit.settle(usage(7))


async def test_what_can_never_fit_says_so(governor):
    with pytest.raises(LimitReached, match=r"too large on tokens.*Limit 60, Requested 61") as caught:
        await governor.admit(tenant(tokens_per_min=60), Estimate(tokens=61))
    assert caught.value.retry_after is None
    assert ("x-should-retry", "false") in caught.value.headers


def test_an_error_that_travels_stays_itself():
    error = pickle.loads(pickle.dumps(LimitReached("No.", retry_after=3, kind="tokens")))
    assert isinstance(error, LimitReached)
    assert (error.message, error.retry_after) == ("No.", 3)


async def test_a_reservation_becomes_the_truth(governor, clock):
    acme = tenant(tokens_per_min=600)
    with await governor.admit(acme, Estimate(tokens=500)) as permit:
        assert await remaining(governor, acme) == 100
        permit.settle(usage(20))
    await governor.aclose()
    assert await remaining(governor, acme) == 580
    with await governor.admit(acme, Estimate(tokens=10)) as permit:
        permit.settle(usage(1000))  # longer than was thought
    await governor.aclose()
    assert await remaining(governor, acme) == 0


async def test_who_leaves_early_pays_what_was_reserved(governor):
    acme = tenant(tokens_per_min=600)
    with await governor.admit(acme, Estimate(tokens=500)):
        pass
    await governor.aclose()
    assert await remaining(governor, acme) == 100


async def test_who_was_refused_further_in_gets_it_back(governor):
    acme = tenant(tokens_per_min=600, requests_per_min=2)
    with pytest.raises(Overloaded), await governor.admit(acme, Estimate(tokens=500)):
        raise Overloaded("full")
    await governor.aclose()
    assert await remaining(governor, acme) == 600
    with await governor.admit(acme, Estimate()) as permit:  # the request itself counts
        assert dict(permit.headers)["x-ratelimit-remaining-requests"] == "0"
        permit.refund()


async def test_one_request_after_the_other_with_one_at_a_time(governor):
    acme = tenant(concurrent_requests=1)
    for _ in range(20):
        with await governor.admit(acme, Estimate()) as permit:
            permit.settle(usage(3))
    with await governor.admit(acme, Estimate()):
        with pytest.raises(LimitReached, match="at once: Limit 1") as caught:
            await governor.admit(acme, Estimate())
        assert caught.value.retry_after == 1


async def test_pictures_are_counted_by_their_pixels(governor):
    acme = tenant(image_pixels_per_min=1000)
    with await governor.admit(acme, Estimate(pixels=600)) as permit:
        permit.settle(usage(5, pictures=[(20, 30)]))
    (await governor.admit(acme, Estimate())).close()  # words alone need no room for pixels
    with pytest.raises(LimitReached, match="pixels per min") as caught:
        await governor.admit(acme, Estimate(pixels=401))
    assert caught.value.type == "pixels"
    with await governor.admit(acme, Estimate(pixels=400)) as permit:
        permit.settle(usage(5, pictures=[(None, None)]))  # the size was not told: what was reserved stands
    await governor.aclose()
    with pytest.raises(LimitReached):
        await governor.admit(acme, Estimate(pixels=1))


async def test_a_full_cache_share_refuses_nobody(clock, steady):
    governor = Governor(clock, SharedLimits(steady), cache_ttl_s=1000)
    acme = tenant(cache_bytes=2000)
    with await governor.admit(acme, Estimate()) as permit:
        assert permit.may_cache
        permit.settle(usage(5, kept=1000))  # half at once: with what drains, 2000 in any lifetime
    await governor.aclose()
    with await governor.admit(acme, Estimate()) as permit:
        assert not permit.may_cache
        permit.settle(usage(5))
    clock.now += 1
    with await governor.admit(acme, Estimate()) as permit:
        assert permit.may_cache
    await governor.aclose()


async def may_cache(governor, asking, num_bytes, *, kept=0):
    with await governor.admit(asking, Estimate(cache_bytes=num_bytes)) as permit:
        permit.settle(Usage(0, 0, 0, 0, kept_bytes=kept))
        return permit.may_cache


async def test_room_in_the_cache_is_reserved_and_what_was_not_needed_comes_back(governor):
    acme = tenant(cache_bytes=2000)
    with await governor.admit(acme, Estimate(cache_bytes=700)) as first:
        with await governor.admit(acme, Estimate(cache_bytes=700)) as second:
            assert (first.may_cache, second.may_cache) == (True, False)
            second.settle(usage(5))
        assert await may_cache(governor, acme, 300)
        first.settle(usage(5, kept=100))
    await governor.aclose()
    assert not await may_cache(governor, acme, 901)
    assert await may_cache(governor, acme, 900)
    await governor.aclose()
    assert await may_cache(governor, acme, 900)  # it was not used, so it is there again


async def test_what_was_kept_counts_however_the_request_ends(governor):
    acme = tenant(cache_bytes=2000, tokens_per_min=600)
    failing = await governor.admit(acme, Estimate(500, cache_bytes=900))
    failing.note_kept(600)
    with pytest.raises(Overloaded), failing:
        raise Overloaded("full")
    await governor.aclose()
    assert await remaining(governor, acme) == 600, "the tokens come back"
    assert not await may_cache(governor, acme, 401)
    with await governor.admit(acme, Estimate(500, cache_bytes=400)) as leaving:
        leaving.note_kept(0)
    await governor.aclose()
    assert await remaining(governor, acme) == 100, "the tokens do not"
    assert await may_cache(governor, acme, 400)


async def test_a_wish_that_does_not_fit_pours_nothing_elsewhere_less(governor):
    acme = tenant(cache_bytes=2000, requests_per_min=2, tokens_per_min=600)
    with await governor.admit(acme, Estimate(tokens=50, cache_bytes=5000)) as permit:
        assert not permit.may_cache
        assert dict(permit.headers)["x-ratelimit-remaining-tokens"] == "550"
        permit.settle(usage(50))
    with pytest.raises(LimitReached, match="tokens"):  # a wish that fits does not let in what does not
        await governor.admit(acme, Estimate(tokens=551, cache_bytes=100))
    assert await may_cache(governor, replace(acme, limits=TenantLimits(cache_bytes=2000)), 1000)


async def test_room_in_the_cache_comes_back_as_its_entries_expire(clock, steady):
    governor = Governor(clock, SharedLimits(steady), cache_ttl_s=1000)
    acme = tenant(cache_bytes=2000)
    assert await may_cache(governor, acme, 1000, kept=1000)
    await governor.aclose()
    clock.now += 499
    assert not await may_cache(governor, acme, 500)
    clock.now += 1
    assert await may_cache(governor, acme, 500)
    await governor.aclose()


async def test_many_at_once_never_keep_more_than_the_bound(clock, steady):
    """Two routers; what is admitted to the cache in any lifetime of an entry stays within the bound."""
    routers = [Governor(clock, SharedLimits(steady), cache_ttl_s=1000) for _ in range(2)]
    acme = tenant(cache_bytes=20_000)
    kept = []

    async def ask(number):
        with await routers[number % 2].admit(acme, Estimate(cache_bytes=300)) as permit:
            stored = 300 if permit.may_cache else 0
            kept.append((clock.now, stored))
            permit.settle(usage(2, kept=stored))

    for _ in range(20):
        await asyncio.gather(*map(ask, range(20)))
        clock.now += 100
    for begin, _ in kept:
        assert sum(stored for at, stored in kept if begin <= at < begin + 1000) <= 20_000
    assert sum(stored for _, stored in kept) > 20_000, "what expired made room"
    for router in routers:
        await router.aclose()


async def test_without_redis_each_router_gives_out_its_share_of_the_cache(clock, steady):
    routers = [Governor(clock, SharedLimits(steady), num_routers=4) for _ in range(4)]
    steady.is_down = True
    acme = tenant(cache_bytes=8000)
    admitted = [await may_cache(router, acme, 250, kept=250) for router in routers for _ in range(8)]
    assert sum(admitted) * 250 == 4000
    assert not await may_cache(routers[0], acme, 1001), "a wish is never more than the share"


async def test_a_hundred_at_once_for_the_last_place(clock, steady):
    """K07: two routers, one request left."""
    routers = [Governor(clock, SharedLimits(steady)) for _ in range(2)]
    acme = tenant(requests_per_min=1, tokens_per_min=1000)

    async def ask(number):
        try:
            with await routers[number % 2].admit(acme, Estimate(tokens=1)) as permit:
                permit.settle(usage(2))
        except LimitReached as refused:
            return refused.retry_after
        return "admitted"

    assert sorted(map(str, await asyncio.gather(*map(ask, range(100))))) == ["60"] * 99 + ["admitted"]
    for router in routers:
        await router.aclose()
        router.check_integrity()


async def test_without_redis_each_router_gives_out_its_share(clock, steady):
    routers = [Governor(clock, SharedLimits(steady), num_routers=4) for _ in range(4)]
    acme = tenant(requests_per_min=40, concurrent_requests=8)
    begun = await routers[0].admit(acme, Estimate())
    steady.is_down = True
    admitted = []
    for router in routers:
        for _ in range(20):
            try:
                permit = await router.admit(acme, Estimate())
            except LimitReached:
                continue
            admitted.append(permit)
            if len(admitted) % 2 == 0:
                admitted[-1].close()
                admitted[-2].close()
    assert len(admitted) == 40
    assert dict(permit.headers)["x-ratelimit-limit-requests"] == "40"
    begun.close()  # admitted by Redis, ended without it: nothing fails, the lease lapses by itself
    steady.is_down = False
    with await routers[0].admit(acme, Estimate()) as permit:
        permit.refund()
    for router in routers:
        await router.aclose()
        router.check_integrity()


async def test_running_requests_keep_their_lease(clock, steady, redis):
    governor = Governor(clock, SharedLimits(steady, lease_s=0.03))
    governor.start()
    acme = tenant(concurrent_requests=1)
    permit = await governor.admit(acme, Estimate())
    redis.flushall()
    async with asyncio.timeout(10):
        while not redis.exists("omni:limits:{acme}:running"):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    with pytest.raises(LimitReached):
        await governor.admit(acme, Estimate())
    permit.close()
    await governor.aclose()
    governor.check_integrity()
    assert not redis.exists("omni:limits:{acme}:running")


def test_an_estimate_from_the_length_of_the_words():
    estimate = Estimate.of(text_bytes=301, image_tokens=64, max_tokens=50, pixels=9, num_answers=2)
    assert estimate == Estimate(tokens=101 + 64 + 100, pixels=9)
