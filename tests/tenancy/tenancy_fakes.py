"""Small honest stand-ins for time, and a Redis whose clock a test moves."""

from __future__ import annotations

from redis import Redis


class HandClock:
    """Monotonic and wall seconds, moved by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def __call__(self) -> float:
        return self.now


class SteadyRedis:
    """Runs our scripts in a real server, with the hand of `clock` in place of the server's own."""

    def __init__(self, redis: Redis, clock: HandClock) -> None:
        self.redis = redis
        self.clock = clock
        self.is_down = False
        self.num_runs = 0

    async def run(self, script, keys, args):
        if self.is_down:
            return None
        self.num_runs += 1
        seconds, micros = divmod(round(self.clock.now * 1e6), 1_000_000)
        assert "redis.call('TIME')" in script.lua
        return self.redis.eval(
            script.lua.replace("redis.call('TIME')", f"{{'{seconds}', '{micros}'}}"), len(keys), *keys, *args
        )
