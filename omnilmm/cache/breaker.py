"""When to stop asking a server that does not answer, and when to ask again."""

from __future__ import annotations

from enum import Enum, auto

from omnilmm.ports import Clock


class Entry(Enum):
    """On what terms a call was let through."""

    CALL = auto()
    PROBE = auto()  # the one call that finds out whether the server is back


class Outcome(Enum):
    ANSWERED = auto()
    FAILED = auto()  # refused, reset, spoke nonsense: cheap to find out, so it takes a few to open
    TIMED_OUT = auto()  # cost the caller its whole budget: one is enough
    CANCELLED = auto()  # the caller left; nothing was learnt


class Breaker:
    """Closed lets every call through; open lets none; after `open_s` one probe decides.

    Args:
        clock: monotonic seconds.
        failures: consecutive failures that open it. A timeout opens it at once.
        open_s: seconds it stays open before a probe may pass.
    """

    def __init__(self, clock: Clock, *, failures: int, open_s: float) -> None:
        self._clock = clock
        self._max_failures = failures
        self._open_s = open_s
        self._num_failures = 0
        self._opened_at: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether the server counts as gone, a probe under way or not."""
        return self._opened_at is not None

    def try_enter(self) -> Entry | None:
        """Let a call through, or None. Every entry must be followed by one `leave`."""
        if self._opened_at is None:
            return Entry.CALL
        if self._probing or self._clock.monotonic() - self._opened_at < self._open_s:
            return None
        self._probing = True
        return Entry.PROBE

    def leave(self, entry: Entry, outcome: Outcome) -> None:
        """Tell how the call went."""
        if entry is Entry.PROBE:
            self._probing = False
        elif self.is_open:
            return  # a straggler from before it opened: the probe decides
        if outcome is Outcome.ANSWERED:
            self._num_failures = 0
            self._opened_at = None
        elif outcome is not Outcome.CANCELLED:
            self._num_failures += 1
            if entry is Entry.PROBE or outcome is Outcome.TIMED_OUT or self._num_failures >= self._max_failures:
                self._opened_at = self._clock.monotonic()
