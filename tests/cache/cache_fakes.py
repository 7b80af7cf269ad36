"""Small honest stand-ins for the cache's neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field

from omnilmm.observe import CacheAsked, Event

SECRET = b"the operator's secret of the tests"


@dataclass
class Recorder:
    """An observer that keeps what it was told."""

    events: list[Event] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def outcomes(self, tier: str) -> list[str]:
        return [event.outcome for event in self.events if isinstance(event, CacheAsked) and event.tier == tier]


class HandClock:
    """A clock moved by hand: breakers open and stay open until a test lets time pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now
