"""What a batch can be, and what may follow what. The names are OpenAI's.

validating ──> in_progress ──> finalizing ──> completed
    │              │
    ├──> failed    ├──> expired        its time ran out: what was finished is kept
    ├──> expired   │
    └──────────────┴──> cancelling ──> cancelled
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Status(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    def can_become(self, other: Status) -> bool:
        return other in NEXT[self]

    @property
    def is_final(self) -> bool:
        return not NEXT[self]


NEXT: Mapping[Status, frozenset[Status]] = MappingProxyType(
    {
        Status.VALIDATING: frozenset({Status.FAILED, Status.IN_PROGRESS, Status.EXPIRED, Status.CANCELLING}),
        Status.IN_PROGRESS: frozenset({Status.FINALIZING, Status.EXPIRED, Status.CANCELLING}),
        Status.FINALIZING: frozenset({Status.COMPLETED}),
        Status.CANCELLING: frozenset({Status.CANCELLED}),
        Status.COMPLETED: frozenset(),
        Status.FAILED: frozenset(),
        Status.EXPIRED: frozenset(),
        Status.CANCELLED: frozenset(),
    }
)

TIMES: Mapping[Status, str] = MappingProxyType(
    {
        Status.IN_PROGRESS: "in_progress_at",
        Status.FINALIZING: "finalizing_at",
        Status.COMPLETED: "completed_at",
        Status.FAILED: "failed_at",
        Status.EXPIRED: "expired_at",
        Status.CANCELLING: "cancelling_at",
        Status.CANCELLED: "cancelled_at",
    }
)
"""The field of a batch that tells when it came into a state."""


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with an input file: OpenAI's code, the line counted from 1, and the member of the line."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class BatchUsage:
    """Sums over the answered lines. `encoded` of the `images` were sent through the vision pool for this batch."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    encoded: int = 0

    def __add__(self, other: BatchUsage) -> BatchUsage:
        return BatchUsage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.images + other.images,
            self.encoded + other.encoded,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch's record. Times are Unix seconds, None for what did not happen."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status
    created_at: int
    expires_at: int
    model: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_expires_after: int | None = None
    counts: Counts = Counts()
    usage: BatchUsage = BatchUsage()
    errors: tuple[LineError, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
