"""How many requests may be on their way to each model's decoders: said at a router's door, where "no" costs least.

Each decoder shares its own line among tenants (`engine.scheduler`), but to be refused there a request has been read,
composed and sent, and waits for a step to end. So a router counts what it has at a model's decoders and refuses by the
same rule (`tenancy.places`) as soon as they must be full. With several routers a decoder may be full earlier than any
of them can know; then what the decoder said to a tenant is remembered for a moment.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from omnilmm.errors import QueueFull
from omnilmm.messages import Priority
from omnilmm.observe import Observer, RequestFinished
from omnilmm.tenancy.access import split_model
from omnilmm.tenancy.places import Places

MAX_REMEMBERED: Final = 1024
UNBOUNDED: Final = 1 << 62

Line = tuple[str, Priority]
"""A base model and a class of priority: decoders have a line for each."""


class Lines:
    """The lines in front of the models' decoders, as one router sees them. Lives on one event loop.

    Args:
        observer: is told of requests that get no further than this.
        clock: monotonic seconds.
    """

    def __init__(self, observer: Observer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._observer = observer
        self._clock = clock
        self._sizes: dict[str, int] = {}
        self._lines: dict[Line, Places] = {}
        self._full_until: OrderedDict[tuple[str, Line], float] = OrderedDict()  # by tenant and line, oldest first

    def resize(self, sizes: Mapping[str, int]) -> None:
        """How many requests, running and waiting, the decoders of each base model can hold. A model that is not named
        has no bound here."""
        kept = {model for model, size in sizes.items() if self._sizes.get(model) == size}
        self._lines = {line: places for line, places in self._lines.items() if line[0] in kept}
        self._sizes = dict(sizes)

    @contextmanager
    def enter(self, tenant: str, model: str, priority: Priority) -> Iterator[None]:
        """Be one of the requests at a model's decoders for as long as the block lasts.

        Raises:
            QueueFull: the tenant has as many there as it may; or a decoder has just said so.
        """
        line = (split_model(model)[0], priority)
        places = self._places(line)
        self._check_memory(tenant, line, places)
        with places.take(tenant):
            try:
                yield
            except QueueFull as full:
                full.lasts_s = places.refusal(tenant).lasts_s
                self._remember(tenant, line, full.lasts_s)
                raise

    def note_refused(self, model: str, seconds: float) -> None:
        """Count a request that was refused at the door, as those are counted that get as far as a decoder."""
        self._observer.emit(
            RequestFinished(
                model=model,
                status=QueueFull.status,
                seconds=seconds,
                ttft_s=None,
                prompt_tokens=0,
                completion_tokens=0,
                cached_tokens=0,
                tokens_seconds=0.0,
            )
        )

    def check_integrity(self) -> None:
        """AssertionError if the books are wrong."""
        for places in self._lines.values():
            places.check_integrity()
        assert len(self._full_until) <= MAX_REMEMBERED, "lines: more is remembered than may be"

    # -- within ---------------------------------------------------------------------------------------

    def _places(self, line: Line) -> Places:
        if line not in self._lines:
            self._lines[line] = Places(self._sizes.get(line[0], UNBOUNDED))
        return self._lines[line]

    def _check_memory(self, tenant: str, line: Line, places: Places) -> None:
        until = self._full_until.get((tenant, line))
        if until is None:
            return
        left_s = until - self._clock()
        if left_s <= 0:
            del self._full_until[tenant, line]
            return
        full = places.refusal(tenant)
        full.lasts_s = left_s
        raise full

    def _remember(self, tenant: str, line: Line, lasts_s: float) -> None:
        if lasts_s <= 0:
            return
        self._full_until.pop((tenant, line), None)
        self._full_until[tenant, line] = self._clock() + lasts_s
        if len(self._full_until) > MAX_REMEMBERED:
            self._full_until.popitem(last=False)
