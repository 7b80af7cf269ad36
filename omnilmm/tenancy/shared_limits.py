"""The leaky buckets of `limits` inside Redis, so that all routers pour into the same ones.

Two keys a tenant, under one hash tag so that a Redis Cluster keeps them together:

    PREFIX{TENANT}:levels    hash, bucket -> "level at", where `at` is the server's time in microseconds
    PREFIX{TENANT}:running   sorted set, permit -> the time its lease ends

Every decision is one script, so it is atomic, and its time is the server's, so the routers' clocks do not matter. Keys
live as long as they mean something: a level until it has drained, a lease until the router that holds it should have
renewed it. A router that dies leaves nothing behind for longer than `lease_s`.

Where the server evicts (the embedded one does, least recently used first), a lost level forgives at most what a
tenant used within the last window, and a lost lease is written again at its next renewal: an eviction can only ever
let somebody in. A server's clock that is set back drains nothing for a moment, and leases that would end later than any
lease can are dropped (the routers write theirs again).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from omnilmm.tenancy.limits import Correction, Decision, Demand


@dataclass(frozen=True, slots=True)
class Script:
    """Lua that runs inside Redis. `sha1` is the name under which the server keeps it."""

    lua: str

    @property
    def sha1(self) -> str:
        return hashlib.sha1(self.lua.encode(), usedforsecurity=False).hexdigest()


class Scripts(Protocol):
    """A Redis that runs scripts."""

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str]) -> Any | None:
        """The script's reply, or None when the server is away, too slow, or refuses. Never raises."""
        ...


_NOW: Final = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local function text(number) return string.format('%.17g', number) end
local function level_of(bucket, limit, window)
  local kept = redis.call('HGET', KEYS[1], bucket)
  if not kept then return 0 end
  local level, at = string.match(kept, '^(%S+) (%S+)$')
  -- the clock was set back: begin to drain again from here, or a full bucket would stay full until that time returns
  if tonumber(at) > now then redis.call('HSET', KEYS[1], bucket, level .. ' ' .. text(now)) end
  return math.max(0, tonumber(level) - math.max(0, now - tonumber(at)) * limit / window)
end
local longest = -1
local function pour(bucket, level, limit, window)
  redis.call('HSET', KEYS[1], bucket, text(level) .. ' ' .. text(now))
  longest = math.max(longest, level / limit * window)
end
local function keep()
  if longest < 0 then return end
  local left = redis.call('PTTL', KEYS[1])
  local wanted = math.ceil(longest / 1000) + 1000
  if wanted > left then redis.call('PEXPIRE', KEYS[1], string.format('%.0f', wanted)) end
end
"""

ADMIT: Final = Script(
    _NOW
    + """
-- permit, lease, most running (-1: any number), then bucket, limit, window, cost, is it a wish (1 or 0) for each demand
-- times in microseconds
local permit, lease, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', text(now))
redis.call('ZREMRANGEBYSCORE', KEYS[2], '(' .. text(now + lease), '+inf')
local crowded = most >= 0 and redis.call('ZCARD', KEYS[2]) >= most
local admitted = not crowded
local levels, denied = {}, {}
for i = 4, #ARGV, 5 do
  local limit, cost = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 3])
  local level = level_of(ARGV[i], limit, tonumber(ARGV[i + 2]))
  if ARGV[i + 4] == '1' then
    denied[i] = level >= limit or level + cost > limit
  elseif cost > 0 and level + cost > limit then
    admitted = false
  end
  levels[i] = level
end
local reply = {admitted and 1 or 0, crowded and 1 or 0, text(now)}
for i = 4, #ARGV, 5 do
  local limit, window, cost = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  if admitted and cost > 0 and not denied[i] then
    levels[i] = levels[i] + cost
    pour(ARGV[i], levels[i], limit, window)
  end
  reply[#reply + 1] = text(levels[i])
  reply[#reply + 1] = denied[i] and 1 or 0
end
if admitted then
  keep()
  redis.call('ZADD', KEYS[2], text(now + lease), permit)
  redis.call('PEXPIRE', KEYS[2], string.format('%.0f', lease / 1000 + 1000))
end
return reply
"""
)

SETTLE: Final = Script(
    _NOW
    + """
-- permit, time of admission, then bucket, limit, window, surplus for each correction
local elapsed = math.max(0, now - tonumber(ARGV[2]))
for i = 3, #ARGV, 4 do
  local limit, window, surplus = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local level = level_of(ARGV[i], limit, window)
  if surplus > 0 then
    surplus = math.max(0, surplus - elapsed * limit / window)
  end
  pour(ARGV[i], math.max(0, level - surplus), limit, window)
end
keep()
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
"""
)

RENEW: Final = Script(
    """
-- lease in microseconds, then the permits whose requests still run
local time = redis.call('TIME')
local ends = tonumber(time[1]) * 1000000 + tonumber(time[2]) + tonumber(ARGV[1])
for i = 2, #ARGV do
  redis.call('ZADD', KEYS[1], string.format('%.0f', ends), ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', tonumber(ARGV[1]) / 1000 + 1000))
return 1
"""
)


class SharedLimits:
    """The books all routers share.

    Args:
        scripts: the server.
        prefix: of all keys.
        lease_s: how long a running request counts without being renewed.
    """

    def __init__(self, scripts: Scripts, *, prefix: str = "omni:limits:", lease_s: float = 30.0) -> None:
        self._scripts = scripts
        self._prefix = prefix
        self._lease = _micros(lease_s)
        self.lease_s: Final = lease_s

    async def admit(
        self, tenant: str, permit: str, demands: Sequence[Demand], *, max_running: int | None
    ) -> Decision | None:
        """Let the request in, or not; None when the server does not say."""
        most = "-1" if max_running is None else str(max_running)
        args = [permit, self._lease, most]
        for demand in demands:
            args += [demand.bucket, repr(float(demand.limit)), _micros(demand.window_s), repr(float(demand.cost))]
            args.append(str(int(demand.is_wish)))
        reply = await self._scripts.run(ADMIT, self._keys(tenant), args)
        if reply is None:
            return None
        try:
            admitted, is_crowded, at, *told = reply
            buckets = [demand.bucket for demand in demands]
            levels = {bucket: float(level) for bucket, level in zip(buckets, told[::2], strict=True)}
            denied = frozenset(bucket for bucket, flag in zip(buckets, told[1::2], strict=True) if flag == 1)
            return Decision(admitted == 1, is_crowded == 1, levels, float(at) / 1e6, denied)
        except (TypeError, ValueError):
            return None  # not the reply of our script

    async def settle(self, tenant: str, permit: str, admitted_at: float, corrections: Sequence[Correction]) -> None:
        """The request is over. If the server is away its lease ends by itself, and what it reserved drains."""
        args = [permit, _micros(admitted_at)]
        for truth in corrections:
            args += [truth.bucket, repr(float(truth.limit)), _micros(truth.window_s), repr(float(truth.surplus))]
        await self._scripts.run(SETTLE, self._keys(tenant), args)

    async def renew(self, tenant: str, permits: Sequence[str]) -> None:
        """These requests still run."""
        await self._scripts.run(RENEW, self._keys(tenant)[1:], [self._lease, *permits])

    def _keys(self, tenant: str) -> list[str]:
        return [f"{self._prefix}{{{tenant}}}:levels", f"{self._prefix}{{{tenant}}}:running"]


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"
