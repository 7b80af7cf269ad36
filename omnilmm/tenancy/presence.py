"""Who is being served at this moment, so that it can be ended when their key is revoked.

A visit is in one of two states. Where it waits for us (for a picture, a token), the task that waits is cancelled and
the visit turns that into its own error, as `asyncio.timeout` does. Where we wait for its client (it has been handed a
piece of its answer and has not asked for the next), there is nothing of ours to wake: it is told when it comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from omnilmm.errors import Unauthorized
from omnilmm.tenancy.tenant import Tenant


class Visit:
    """One request of a tenant, from its admission to its end: a context manager around the work for it.

    The work may be a generator that different tasks carry on: put `pause` in front of every `yield` and `resume`
    behind it.
    """

    __slots__ = ("_is_over", "_num_cancelled", "_presence", "_task", "tenant")

    def __init__(self, presence: Presence, tenant: Tenant) -> None:
        self._presence = presence
        self._task: asyncio.Task[Any] | None = None
        self._num_cancelled = 0
        self._is_over = False
        self.tenant = tenant

    def pause(self) -> None:
        """Our part is done for now."""
        self._task = None

    def resume(self) -> None:
        """Go on, in whichever task this is. Raises Unauthorized if the visit was ended meanwhile."""
        if self._is_over:
            raise _ended()
        self._task = task = asyncio.current_task()
        self._num_cancelled = 0 if task is None else task.cancelling()

    def end(self) -> None:
        """What `Presence.show_out` does."""
        if not self._is_over:
            self._is_over = True
            if self._task is not None:
                self._task.cancel()

    def __enter__(self) -> Self:
        self.resume()
        self._presence.visits.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._presence.visits.discard(self)
        task, self._task = self._task, None
        if not self._is_over or task is None:
            return
        # If somebody else cancelled the task too, that goes on.
        if task.uncancel() <= self._num_cancelled and isinstance(error, asyncio.CancelledError):
            raise _ended() from None


class Presence:
    """The visits of one process."""

    def __init__(self) -> None:
        self.visits: set[Visit] = set()

    def show_out(self, is_unwelcome: Callable[[Tenant], bool]) -> int:
        """End the visits of tenants who may not stay; how many there were. Call it on the visits' event loop."""
        leaving = [visit for visit in self.visits if is_unwelcome(visit.tenant)]
        for visit in leaving:
            visit.end()
        return len(leaving)

    def check_integrity(self) -> None:
        """Assert that nobody is left. Call when idle."""
        assert not self.visits, "presence: a visit was not left"


def _ended() -> Unauthorized:
    return Unauthorized("The API key of this request was revoked.")
