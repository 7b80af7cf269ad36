"""Where a tenant stands, as OpenAI tells it: x-ratelimit-* headers, and the words of a refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from omnilmm.errors import RateLimited

REQUESTS: Final = "requests"
TOKENS: Final = "tokens"
PIXELS: Final = "pixels"
CACHE: Final = "cache"

_UNITS: Final = (
    (REQUESTS, "requests per min (RPM)"),
    (TOKENS, "tokens per min (TPM)"),
    (PIXELS, "pixels per min (IPM)"),
)


@dataclass(frozen=True, slots=True)
class Standing:
    """One bucket after a decision. `limit` is the tenant's, `room` what of it can be given here, `cost` was asked."""

    bucket: str
    limit: int
    room: float
    level: float
    window_s: float
    cost: float

    @property
    def remaining(self) -> int:
        return max(0, math.floor(self.room - self.level))

    @property
    def reset_s(self) -> float:
        """Seconds until the bucket is empty."""
        return self.level / self.room * self.window_s

    @property
    def is_too_large(self) -> bool:
        """Whether the request would not even fit an empty bucket."""
        return self.cost > self.limit

    @property
    def wait_s(self) -> float:
        """Seconds until the request fits; one that is bigger than our share waits for an empty bucket."""
        if self.cost <= 0:
            return 0.0
        over = self.level + min(self.cost, self.room) - self.room
        return max(0.0, over) / self.room * self.window_s


class LimitReached(RateLimited):
    """One of the tenant's own limits. `headers` go with the response."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        kind: str = REQUESTS,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after=retry_after)
        self.type = kind
        self.headers = tuple(headers)


def rate_limit_headers(standings: Sequence[Standing]) -> tuple[tuple[str, str], ...]:
    """Limit, remaining and reset of requests and tokens, for the limits the tenant has."""
    headers: list[tuple[str, str]] = []
    for standing in standings:
        if standing.bucket in (REQUESTS, TOKENS):
            headers += [
                (f"x-ratelimit-limit-{standing.bucket}", str(standing.limit)),
                (f"x-ratelimit-remaining-{standing.bucket}", str(standing.remaining)),
                (f"x-ratelimit-reset-{standing.bucket}", spell_duration(standing.reset_s)),
            ]
    return tuple(headers)


def refusal(standings: Sequence[Standing], *, max_running: int | None) -> LimitReached:
    """The 429 for a request that did not fit. `max_running` is given when too many requests run."""
    headers = list(rate_limit_headers(standings))
    for standing in standings:
        if standing.is_too_large:
            headers.append(("x-should-retry", "false"))  # OpenAI's clients obey it
            message = f"Request too large on {_unit(standing)}: Limit {standing.limit}, Requested {standing.cost:.0f}."
            return LimitReached(message, kind=standing.bucket, headers=headers)
    if max_running is not None:
        headers.append(("retry-after-ms", "1000"))
        message = f"Too many requests at once: Limit {max_running}. Please try again when one has ended."
        return LimitReached(message, retry_after=1, headers=headers)
    longest = max(standings, key=lambda standing: standing.wait_s)
    wait_ms = max(1, math.ceil(longest.wait_s * 1000))
    headers.append(("retry-after-ms", str(wait_ms)))
    used = min(longest.limit, math.ceil(longest.level))
    message = (
        f"Rate limit reached on {_unit(longest)}: Limit {longest.limit}, Used {used}, Requested {longest.cost:.0f}. "
        f"Please try again in {spell_duration(wait_ms / 1000)}."
    )
    return LimitReached(message, kind=longest.bucket, retry_after=math.ceil(wait_ms / 1000), headers=headers)


def spell_duration(seconds: float) -> str:
    """As OpenAI writes durations, which is Go's way, to the millisecond: 120ms, 1s, 8.64s, 6m0s, 1h0m0s."""
    millis = max(0, math.ceil(seconds * 1000 - 1e-6))
    if millis == 0:
        return "0s"
    if millis < 1000:
        return f"{millis}ms"
    minutes, rest = divmod(millis, 60_000)
    hours, minutes = divmod(minutes, 60)
    spelt = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{spelt}"
    return f"{minutes}m{spelt}" if minutes else spelt


def _unit(standing: Standing) -> str:
    return dict(_UNITS)[standing.bucket]
