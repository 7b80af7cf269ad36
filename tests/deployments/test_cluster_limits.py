"""Limits over a real Redis, as two routers share it, and what is left of them when it goes."""

from __future__ import annotations

import asyncio

import pytest
from redis import Redis

from deployments.limits import ClusterGovernor
from deployments.redis_server import RedisServer
from omnilmm.errors import ConfigError
from omnilmm.messages import Usage
from omnilmm.pipeline import SystemClock
from omnilmm.tenancy.governor import Estimate
from omnilmm.tenancy.standing import LimitReached
from omnilmm.tenancy.tenant import Tenant, TenantLimits

PATIENT_S = 5.0


@pytest.fixture(scope="module")
def module_server():
    with RedisServer(max_memory_bytes=16 << 20) as server:
        yield server


@pytest.fixture
def url(module_server):
    with Redis.from_url(module_server.url) as client:
        client.flushall()
        client.script_flush()  # nobody may count on a script that is already there
    return module_server.url


@pytest.fixture
async def make_router():
    routers = []

    def make(url, *, num_routers=2, timeout_s=PATIENT_S):
        routers.append(
            ClusterGovernor(url, clock=SystemClock(), timeout_s=timeout_s, num_routers=num_routers, cache_ttl_s=1000.0)
        )
        routers[-1].start()
        return routers[-1]

    yield make
    for router in routers:
        await router.aclose()
        router.check_integrity()


def tenant(**limits):
    return Tenant("acme", "acme", limits=TenantLimits(**limits))


async def attempt(router, asking, tokens=0):
    try:
        with await router.admit(asking, Estimate(tokens=tokens)) as permit:
            permit.settle(Usage(tokens, 0, 0, 0))
    except LimitReached:
        return 0
    return 1


async def test_a_hundred_at_once_for_the_last_place(url, make_router):
    routers = [make_router(url), make_router(url)]
    acme = tenant(requests_per_min=1)
    assert sum(await asyncio.gather(*(attempt(routers[i % 2], acme) for i in range(100)))) == 1


async def test_routers_pour_into_one_bucket_and_share_the_places(url, make_router):
    routers = [make_router(url), make_router(url)]
    acme = tenant(tokens_per_min=100, concurrent_requests=2)
    permits = [await router.admit(acme, Estimate(tokens=10)) for router in routers]
    for router in routers:
        with pytest.raises(LimitReached, match="at once"):
            await router.admit(acme, Estimate(tokens=1))
    permits[0].settle(Usage(80, 0, 0, 0))
    permits[0].close()
    await routers[0].aclose()
    with pytest.raises(LimitReached, match="tokens per min"):
        await routers[1].admit(acme, Estimate(tokens=20))
    permits[1].close()


async def test_a_server_that_dies_leaves_each_router_its_share(make_router):
    with RedisServer(max_memory_bytes=16 << 20) as server:
        routers = [make_router(server.url), make_router(server.url)]
        acme = tenant(requests_per_min=20)
        assert await attempt(routers[0], acme)
        server.stop()
        admitted = [sum([await attempt(router, acme) for _ in range(20)]) for router in routers]
        assert admitted == [10, 10]


async def test_without_a_redis_there_are_only_shares(make_router):
    router = make_router(None, num_routers=4)
    assert sum([await attempt(router, tenant(requests_per_min=20)) for _ in range(20)]) == 5


async def test_a_server_that_forbids_scripts_counts_as_none(url, make_router, caplog):
    with Redis.from_url(url) as client:
        client.acl_setuser("plain", enabled=True, nopass=True, keys="*", commands=["+ping", "+get"])
    router = make_router(url.replace("unix://", "unix://plain:x@"), num_routers=1)
    assert await attempt(router, tenant(requests_per_min=20))
    assert "refuses a script" in caplog.text
    with Redis.from_url(url) as client:
        assert client.keys("*") == []


async def test_the_documented_acl_is_enough(url, make_router):
    commands = [
        "+ping",
        "+eval",
        "+evalsha",
        "+time",
        "+hget",
        "+hset",
        "+pttl",
        "+pexpire",
        "+zadd",
        "+zrem",
        "+zcard",
        "+zremrangebyscore",
    ]
    with Redis.from_url(url) as client:
        client.acl_setuser("limits", enabled=True, nopass=True, keys="omni:limits:*", commands=commands)
    router = make_router(url.replace("unix://", "unix://limits:x@"), num_routers=1000)
    acme = tenant(requests_per_min=20, tokens_per_min=100, concurrent_requests=9)
    assert sum([await attempt(router, acme, tokens=3) for _ in range(10)]) == 10  # our share alone would be 1
    await router.renew()


async def test_a_bad_url_is_refused():
    with pytest.raises(ConfigError):
        ClusterGovernor("http://x", clock=SystemClock(), timeout_s=1, num_routers=1, cache_ttl_s=1)
