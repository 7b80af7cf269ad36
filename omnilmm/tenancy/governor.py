"""Who may begin now: the tenants' limits at the door of every router.

    permit = await governor.admit(tenant, Estimate(tokens=..., pixels=...))     # or LimitReached
    with permit:
        ...                                                                     # the answer
        permit.settle(usage)

The books are Redis's where there is one, so that all routers keep them together. While it is away each router gives
out its own share of every limit: limit / number of routers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from omnilmm.errors import OmniError
from omnilmm.messages import Usage
from omnilmm.ports import Clock
from omnilmm.tenancy.limits import MINUTE_S, Correction, Decision, Demand, LocalLimits
from omnilmm.tenancy.shared_limits import SharedLimits
from omnilmm.tenancy.standing import CACHE, PIXELS, REQUESTS, TOKENS, Standing, rate_limit_headers, refusal
from omnilmm.tenancy.tenant import Tenant

TEXT_BYTES_PER_TOKEN: Final = 3
"""A cautious guess for any language: 1 token a Chinese character (3 bytes of UTF-8), 1.3 an English word."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request may take, known before it runs.

    `pixels` are those of its pictures, by their headers, `cache_bytes` those of their vectors, were all of them new.
    """

    tokens: int = 0
    pixels: int = 0
    cache_bytes: int = 0

    @classmethod
    def of(
        cls,
        *,
        text_bytes: int,
        image_tokens: int,
        max_tokens: int,
        pixels: int = 0,
        num_answers: int = 1,
        cache_bytes: int = 0,
    ) -> Self:
        """From the length of the words in UTF-8, where counting tokens would cost more than it tells."""
        prompt = -(-text_bytes // TEXT_BYTES_PER_TOKEN) + image_tokens
        return cls(prompt + max_tokens * num_answers, pixels, cache_bytes)


@dataclass(frozen=True, slots=True)
class Books:
    """A decision, and where it is written down: in Redis, or here as a share of every limit."""

    permit: str
    demands: tuple[Demand, ...]
    decision: Decision
    is_shared: bool
    share: float

    @property
    def standings(self) -> list[Standing]:
        return [
            Standing(
                demand.bucket,
                limit=int(demand.limit),
                room=demand.limit * self.share,
                level=self.decision.levels[demand.bucket],
                window_s=demand.window_s,
                cost=demand.cost,
            )
            for demand in self.demands
        ]


class Permit:
    """A request that was let in. Close it when the request is over, however it ended; it is a context manager.

    Closed without `settle` or `refund` it costs what was reserved: a client that leaves before the last token has
    still had the work done. An OmniError that leaves the `with` block refunds. What the request put into the cache lies
    there however it ended: tell it to `note_kept`.

    Attributes:
        headers: x-ratelimit-* for the response.
        may_cache: whether the vectors of the request's pictures may be kept; room for them is reserved.
    """

    def __init__(self, governor: Governor, tenant: str, books: Books | None = None) -> None:
        self._governor = governor
        self._taken: dict[str, float] = {}
        self._is_settled = False
        self._is_open = True
        self.tenant: Final = tenant
        self.books: Final = books
        self.headers = rate_limit_headers(books.standings if books is not None else ())
        self.may_cache = books is None or CACHE not in books.decision.denied

    def settle(self, usage: Usage) -> None:
        """The truth about the whole request."""
        self._is_settled = True
        self._taken[TOKENS] = usage.prompt_tokens + usage.completion_tokens
        sizes = [(image.width, image.height) for image in usage.images]
        known = [width * height for width, height in sizes if width is not None and height is not None]
        if len(known) == len(sizes):
            self._taken[PIXELS] = sum(known)
        self.note_kept(usage.kept_bytes)

    def refund(self) -> None:
        """Nothing was generated: only the request itself counts, and what it put into the cache."""
        self._is_settled = True
        self._taken = {TOKENS: 0, PIXELS: 0, CACHE: self._taken.get(CACHE, 0)}

    def note_kept(self, num_bytes: int) -> None:
        """How many bytes of picture vectors the request has put into the cache."""
        self._taken[CACHE] = num_bytes

    def close(self) -> None:
        """The request is over. Returns at once; the books are written behind the caller's back."""
        if self._is_open:
            self._is_open = False
            if self.books is not None:
                self._governor.release(self.tenant, self.books, self._corrections())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OmniError) and not self._is_settled:
            self.refund()
        self.close()

    def _corrections(self) -> list[Correction]:
        if self.books is None:
            return []
        corrections = []
        for demand in self.books.demands:
            poured = 0.0 if demand.bucket in self.books.decision.denied else demand.cost
            surplus = poured - self._taken.get(demand.bucket, poured)
            if surplus:
                corrections.append(Correction(demand.bucket, demand.limit, demand.window_s, surplus))
        return corrections


class Governor:
    """Admission by the tenants' limits, for one router replica.

    Args:
        clock: monotonic seconds.
        shared: the books of all routers, if there is a Redis.
        num_routers: how many routers divide the limits among them while Redis is away (or where there is none).
        cache_ttl_s: how long a vector stays in the cache: the window of `cache_bytes`.
    """

    def __init__(
        self,
        clock: Clock,
        shared: SharedLimits | None = None,
        *,
        num_routers: int = 1,
        cache_ttl_s: float = 7 * 86_400.0,
    ) -> None:
        self._shared = shared
        self._local = LocalLimits(clock)
        self._cache_ttl_s = cache_ttl_s
        self.num_routers = num_routers
        self._leases: dict[str, set[str]] = {}  # tenant: permits whose lease we renew
        self._settling: dict[str, set[asyncio.Task[None]]] = {}
        self._renewing = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to renew the leases of running requests."""
        if self._shared is not None and self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_task(self._renew_forever(self._shared))

    async def admit(self, tenant: Tenant, estimate: Estimate) -> Permit:
        """Let a request in.

        Raises:
            LimitReached: it does not fit the tenant's limits now, or ever (then it says so).
        """
        demands = _demands(tenant, estimate, self._cache_ttl_s)
        if not demands and tenant.limits.concurrent_requests is None:
            return Permit(self, tenant.name)
        books = await self._ask(tenant, demands)
        if books.decision.is_crowded and (settling := self._settling.get(tenant.name)):
            await asyncio.wait(set(settling))  # requests that ended before this one came, but not yet in the books
            books = await self._ask(tenant, demands)
        if not books.decision.admitted:
            most = tenant.limits.concurrent_requests if books.decision.is_crowded else None
            raise refusal([s for s in books.standings if s.bucket != CACHE], max_running=most)
        if books.is_shared:
            self._leases.setdefault(tenant.name, set()).add(books.permit)
        return Permit(self, tenant.name, books)

    def release(self, tenant: str, books: Books, corrections: Sequence[Correction]) -> None:
        """What `Permit.close` does."""
        if not books.is_shared:
            self._local.settle(tenant, books.permit, books.decision.at, corrections, share=books.share)
            return
        mine = self._leases[tenant]
        mine.remove(books.permit)
        if not mine:
            del self._leases[tenant]
        task = asyncio.get_running_loop().create_task(self._settle(tenant, books, corrections))
        self._settling.setdefault(tenant, set()).add(task)
        task.add_done_callback(lambda done: self._forget(tenant, done))

    async def renew(self) -> None:
        """Write the leases of all running requests again, also those a restarted Redis has lost."""
        if self._shared is None:
            return
        async with self._renewing:
            for tenant, permits in [*self._leases.items()]:
                await self._shared.renew(tenant, [*permits])

    async def aclose(self) -> None:
        """Stop renewing, and wait until the books are written."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait({self._renewal})
        waiting = {task for tasks in self._settling.values() for task in tasks}
        if waiting:
            await asyncio.wait(waiting)

    def check_integrity(self) -> None:
        """Assert that no request counts as running. Call when idle."""
        assert not self._leases, "governor: a permit was not closed"
        assert not self._local.num_running, "governor: a local permit was not closed"
        assert not self._settling, "governor: a settlement is still under way"

    # -- within ---------------------------------------------------------------------------------------

    async def _ask(self, tenant: Tenant, demands: Sequence[Demand]) -> Books:
        """The decision of Redis, or else of our own books."""
        most = tenant.limits.concurrent_requests
        permit = secrets.token_hex(12)
        if self._shared is not None:
            decision = await self._shared.admit(tenant.name, permit, demands, max_running=most)
            if decision is not None:
                return Books(permit, tuple(demands), decision, is_shared=True, share=1.0)
        share = 1 / max(1, self.num_routers)
        decision = self._local.admit(tenant.name, permit, demands, max_running=most, share=share)
        return Books(permit, tuple(demands), decision, is_shared=False, share=share)

    async def _settle(self, tenant: str, books: Books, corrections: Sequence[Correction]) -> None:
        assert self._shared is not None
        async with self._renewing:  # a renewal that overtook us would bring the lease back
            await self._shared.settle(tenant, books.permit, books.decision.at, corrections)

    def _forget(self, tenant: str, task: asyncio.Task[None]) -> None:
        tasks = self._settling[tenant]
        tasks.discard(task)
        if not tasks:
            del self._settling[tenant]

    async def _renew_forever(self, shared: SharedLimits) -> None:
        while True:
            await asyncio.sleep(shared.lease_s / 3)
            await self.renew()


def _demands(tenant: Tenant, estimate: Estimate, cache_ttl_s: float) -> list[Demand]:
    limits = tenant.limits
    # Half of it at once and half drained over the life of an entry: no more than the whole can ever lie there.
    cache_bytes = None if limits.cache_bytes is None else limits.cache_bytes / 2
    asked = (
        (REQUESTS, limits.requests_per_min, MINUTE_S, 1),
        (TOKENS, limits.tokens_per_min, MINUTE_S, estimate.tokens),
        (PIXELS, limits.image_pixels_per_min, MINUTE_S, estimate.pixels),
        (CACHE, cache_bytes, cache_ttl_s, estimate.cache_bytes),
    )
    return [
        Demand(bucket, float(limit), window_s, float(cost), is_wish=bucket == CACHE)
        for bucket, limit, window_s, cost in asked
        if limit is not None
    ]
