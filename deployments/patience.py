"""Refusals at a walking pace: who sends garbage faster than that waits for each "no".

To refuse a request costs a router nearly as much as to begin an answer, and no limit of a tenant's makes it cheaper.
What does is to let the sender wait, because a connection sends nothing while it waits. So each tenant (or, without a
key, each address) has a bucket of refusals. One that overflows is answered when its turn comes: `REFUSALS_PER_S` a
second, however many connections they come on. What a healthy client is refused now and then is told at once.

Waiting is bounded: at most MAX_WAIT_S, and for MAX_HELD requests of a router at a time. A flood from more connections
than that passes; it has to be stopped where connections are counted, in front of the router.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

REFUSALS_PER_S = 10.0
BURST = 40
MAX_WAIT_S = 5.0
MAX_HELD = 96
MAX_SENDERS = 1024
"""Buckets that are kept; the one unused for longest goes first."""
REFUSED = frozenset({400, 401, 403, 404, 405, 413, 415, 422, 429})


class Patience:
    """ASGI middleware; `request.state.tenant` names who was refused.

    Args:
        app: what answers.
        clock: monotonic seconds.
        sleep: as asyncio.sleep.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._app = app
        self._clock = clock
        self._sleep = sleep
        self._due: OrderedDict[str, float] = OrderedDict()  # when a sender's next refusal is due, last used last
        self.num_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def patient(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in REFUSED:
                await self._hold(_sender(scope))
            await send(message)

        await self._app(scope, receive, patient)

    async def _hold(self, sender: str) -> None:
        wait_s = self._take_turn(sender)
        if wait_s <= 0 or self.num_held >= MAX_HELD:
            return
        self.num_held += 1
        try:
            await self._sleep(wait_s)
        finally:
            self.num_held -= 1

    def _take_turn(self, sender: str) -> float:
        """Seconds until this refusal is due: a leaky bucket by the time at which it will have run dry."""
        now = self._clock()
        due = max(self._due.pop(sender, now), now)
        wait_s = due - now - BURST / REFUSALS_PER_S
        if wait_s < MAX_WAIT_S:  # a bucket that is full grows no further
            due += 1 / REFUSALS_PER_S
        self._due[sender] = due
        if len(self._due) > MAX_SENDERS:
            self._due.popitem(last=False)
        return min(wait_s, MAX_WAIT_S)


def _sender(scope: Scope) -> str:
    tenant = scope.get("state", {}).get("tenant")
    if tenant is not None:
        return f"tenant {tenant.name}"
    client = scope.get("client")
    return f"address {client[0] if client else ''}"
