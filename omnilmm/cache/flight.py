"""Single flight: of all requests for one picture, in all processes, one encodes and the others wait for it.

In this process a lease is an entry in a dict. Among processes it is a Redis key that names its holder and expires
unless a heartbeat renews it; news travels by pub/sub, and a poll catches what pub/sub lost: a message sent while
nobody listened, a holder that died. So nothing here is needed for correctness. If all of it fails, a picture is
encoded twice.

    who                 owns                                             until
    StoreLease          the future its followers in this process await   resolve, abandon, or dropped unresolved
    its heartbeat task  the renewal in Redis                             the lease ends
    StoreFlight         nothing; waiting registers, leaving unregisters
    the watch task      the subscription and the polls                   nobody here waits for another process
"""

from __future__ import annotations

import asyncio
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from omnilmm.cache.link import Subscription
from omnilmm.cache.redis import KeyState, RedisTier, read_wake
from omnilmm.messages import Encoded

POLL_S: Final = 0.25
"""Between two looks at the keys others are encoding. News comes sooner; this bounds how late a death is noticed."""

Landing = asyncio.Future[Encoded | None]
"""How a flight ends: the leader's result, or None if there is none to be had."""


class StoreLease:
    """This process encodes `key`, on behalf of everyone. Implements ports.Lease.

    Ending it twice does nothing. If it is dropped without an end, its heartbeat stops, those who wait look the key up
    again, and Redis forgets it after `lease_s`.
    """

    def __init__(self, flights: Flights, key: str) -> None:
        self.key = key
        self.landing: Landing = asyncio.get_running_loop().create_future()
        self._flights = flights

    async def resolve(self, encoded: Encoded) -> None:
        await self._flights.end(self, encoded)

    async def abandon(self) -> None:
        await self._flights.end(self, None)


class StoreFlight:
    """Someone else encodes `key`: a lease of this process (then `landing` is its future), or of another."""

    def __init__(self, flights: Flights, key: str, landing: Landing | None) -> None:
        self._flights = flights
        self._key = key
        self._landing = landing

    async def wait(self, timeout_s: float) -> Encoded | None:
        """Their result, with the vectors in it if only this process has them; None means look the key up again."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._landing is None:
                    return await self._flights.await_news(self._key)
                return await asyncio.shield(self._landing)
        except TimeoutError:
            return None


@dataclass(slots=True)
class _Awaited:
    """A key another process encodes, and how many here wait for it."""

    landing: Landing
    num_waiters: int = 0


class Flights:
    """The leases of this process and its waits for those of others. For one event loop.

    Args:
        redis: where other processes are met; None means there are none.
        lease_s: how long a lease outlives its last heartbeat.
    """

    def __init__(self, redis: RedisTier | None, lease_s: float) -> None:
        self._redis = redis
        self._lease_s = lease_s
        self.token = secrets.token_hex(16).encode()
        """Names this process as the holder of a lease."""
        # Weak, so that a lease its holder lost does not block its key for ever.
        self._leases: weakref.WeakValueDictionary[str, StoreLease] = weakref.WeakValueDictionary()
        self._heartbeats: dict[Landing, asyncio.Task[None]] = {}
        self._awaited: dict[str, _Awaited] = {}
        self._watcher: asyncio.Task[None] | None = None

    # -- taking part ----------------------------------------------------------------------------------

    def can_join(self, key: str) -> bool:
        """Whether this process encodes `key` now."""
        return key in self._leases

    def try_join(self, key: str) -> StoreFlight | None:
        """Follow a lease of this process, if there is one."""
        lease = self._leases.get(key)
        return None if lease is None else StoreFlight(self, key, lease.landing)

    def take(self, key: str, state: KeyState | None) -> StoreLease | StoreFlight:
        """Lead or follow, given how the key stands; None means that Redis does not say."""
        joined = self.try_join(key)
        if joined is not None:
            return joined
        if state is None:
            return self._lead(key, renew=False)
        if state.holder == self.token:
            # Not new, and no one here holds it: a leftover of ours, from when Redis was out. It may soon expire.
            return self._lead(key, renew=not state.is_new)
        return StoreFlight(self, key, None)

    # -- leading --------------------------------------------------------------------------------------

    def _lead(self, key: str, *, renew: bool) -> StoreLease:
        lease = StoreLease(self, key)
        self._leases[key] = lease
        heartbeat = self._beat(weakref.ref(lease), key, lease.landing, renew)
        self._heartbeats[lease.landing] = asyncio.create_task(heartbeat, name=f"heartbeat {key}")
        return lease

    async def _beat(self, lease: weakref.ref[StoreLease], key: str, landing: Landing, renew: bool) -> None:
        while True:
            if renew and self._redis is not None:
                await self._redis.keep_lease(key, self.token, self._lease_s)
            await asyncio.sleep(self._lease_s / 3)
            renew = True
            if lease() is None:
                self._heartbeats.pop(landing, None)
                landing.set_result(None)
                return

    async def end(self, lease: StoreLease, encoded: Encoded | None) -> None:
        """Let go in Redis, wake the followers elsewhere, then those here.

        In this order because a follower here that is told to look again could lead at once, in the name of the very
        lease that is about to be let go.
        """
        heartbeat = self._heartbeats.pop(lease.landing, None)
        if heartbeat is None:
            return  # ended before
        try:
            heartbeat.cancel()
            await asyncio.wait({heartbeat})  # a renewal under way must not outlive the release
            if self._redis is not None:
                stored = encoded is not None and encoded.stored
                await self._redis.end_lease(lease.key, self.token, stored=stored)
        finally:
            if self._leases.get(lease.key) is lease:
                del self._leases[lease.key]
            lease.landing.set_result(encoded)
            self._settle(lease.key, encoded)

    # -- following another process --------------------------------------------------------------------

    async def await_news(self, key: str) -> Encoded | None:
        """Wait, for as long as the caller likes, for the process that encodes `key`."""
        assert self._redis is not None, "only another process can be followed this way"
        awaited = self._awaited.get(key)
        is_new = awaited is None
        if awaited is None:
            awaited = self._awaited[key] = _Awaited(asyncio.get_running_loop().create_future())
        awaited.num_waiters += 1
        try:
            if self._watcher is None:
                self._watcher = asyncio.create_task(self._watch(self._redis), name="cache watch")
            if is_new:
                await self._poll(self._redis, [key])  # it may have ended since the lookup
            return await asyncio.shield(awaited.landing)
        finally:
            awaited.num_waiters -= 1
            if not awaited.num_waiters and self._awaited.get(key) is awaited:
                del self._awaited[key]

    async def _watch(self, redis: RedisTier) -> None:
        """Runs while anyone here waits for another process."""
        news: Subscription | None = None
        try:
            while self._awaited:
                if news is None or not news.is_alive:
                    news = await redis.subscribe()
                await self._poll(redis, list(self._awaited))  # after subscribing: what came before is not missed
                await self._listen(news)
        finally:
            self._watcher = None  # before anything is awaited: whoever waits from now on starts the next one
            if news is not None:
                await news.aclose()

    async def _listen(self, news: Subscription | None) -> None:
        """Pass on messages until the next poll is due."""
        loop = asyncio.get_running_loop()
        due = loop.time() + POLL_S
        while (left := due - loop.time()) > 0:
            if news is None or not news.is_alive:
                await asyncio.sleep(left)
                return
            message = await news.next(left)
            wake = None if message is None else read_wake(message)
            if wake is not None:
                self._settle(wake.key, _found_elsewhere() if wake.stored else None)

    async def _poll(self, redis: RedisTier, keys: Sequence[str]) -> None:
        states = await redis.look(keys) if keys else []
        if states is None:
            if redis.is_down:  # no news can come: let everyone fend for themselves
                for key in keys:
                    self._settle(key, None)
            return
        for key, state in zip(keys, states, strict=True):
            if state.stored:
                self._settle(key, _found_elsewhere())
            elif state.holder is None or state.holder == self.token:
                self._settle(key, None)

    def _settle(self, key: str, encoded: Encoded | None) -> None:
        awaited = self._awaited.pop(key, None)
        if awaited is not None:
            awaited.landing.set_result(encoded)

    # -- the end --------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that nobody leads and nobody waits. Call when idle."""
        assert not self._leases, f"flights: {len(self._leases)} leases were not ended"
        assert not self._heartbeats, f"flights: {len(self._heartbeats)} heartbeats without a lease"
        assert not self._awaited, f"flights: {len(self._awaited)} keys still awaited"

    async def aclose(self) -> None:
        """Abandon every lease, send every waiter away, end every task."""
        for lease in list(self._leases.values()):
            await lease.abandon()
        for key in list(self._awaited):
            self._settle(key, None)
        lost, self._heartbeats = self._heartbeats, {}  # what is left are leases that were dropped
        for landing in lost:
            landing.set_result(None)
        tasks = [*lost.values(), *([self._watcher] if self._watcher else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _found_elsewhere() -> Encoded:
    """Another process stored it: the vectors are in Redis, and no time was spent here."""
    return Encoded(embedding=None, stored=True, seconds=0.0)
