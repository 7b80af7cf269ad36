"""What happened, as frozen events handed to one Observer. No metrics library here: adapters live at the edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from omnilmm.messages import ImageSource


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A request ended, well or badly. `status` is the HTTP status, 499 when the client left. Seconds."""

    model: str
    status: int
    seconds: float
    ttft_s: float | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    tokens_seconds: float  # from the first token to the last


@dataclass(frozen=True, slots=True)
class ImageResolved:
    """A picture's vectors were found or made."""

    model: str
    source: ImageSource
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchEncoded:
    """The vision tower ran once over `size` pictures, the first of which had waited `queue_s`."""

    size: int
    seconds: float
    queue_s: float


@dataclass(frozen=True, slots=True)
class StepRun:
    """The engine ran one step."""

    num_sequences: int
    num_tokens: int
    seconds: float
    blocks_used: int
    blocks_total: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """A sequence's prompt is in the KV cache."""

    queue_s: float
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class CacheAsked:
    """One key was looked for in one tier ("memory" or "redis"): outcome "hit", "miss", "bad", "error" or
    "refused" (a lossy encoding did not fit the vectors)."""

    tier: str
    outcome: str
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Retried:
    """A call was sent again. `stage` is "encode" or "decode"."""

    stage: str


Event = RequestFinished | ImageResolved | BatchEncoded | StepRun | PrefillDone | CacheAsked | Retried


class Observer(Protocol):
    def emit(self, event: Event) -> None:
        """Note the event. Must be quick, thread-safe, and never raise."""
        ...


class Silent:
    """The observer that notes nothing."""

    def emit(self, event: Event) -> None:
        return None
