"""Who comes while a step is computed, and whether it is given up for one of them."""

from __future__ import annotations

from collections.abc import Callable

from omnilmm.messages import GenerateCall

Newcomers = Callable[[], tuple[GenerateCall, ...]]
"""Calls that have come since a step began, in the order they came; never fewer than before. Cheap, never blocks."""


def nobody() -> tuple[GenerateCall, ...]:
    return ()


class Lookout:
    """Looks out for one whom a step makes way for, and looks at everybody once.

    Args:
        newcomers: who has come.
        makes_way: whether the step makes way for a call. The answer may not change during the step.
    """

    def __init__(self, newcomers: Newcomers, makes_way: Callable[[GenerateCall], bool]) -> None:
        self._newcomers = newcomers
        self._makes_way = makes_way
        self._num_seen = 0
        self.found: GenerateCall | None = None

    def should_yield(self) -> bool:
        """Whether somebody has been found."""
        calls = self._newcomers()
        if self.found is None and len(calls) > self._num_seen:
            self.found = next(filter(self._makes_way, calls[self._num_seen :]), None)
            self._num_seen = len(calls)
        return self.found is not None
