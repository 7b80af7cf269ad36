"""What an operator may say about a tenant, checked once for the command line, the admin API and the records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from omnilmm.errors import InvalidRequest
from omnilmm.messages import Priority
from omnilmm.tenancy.access import is_entry
from omnilmm.tenancy.tenant import Tenant, TenantLimits

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_MODELS: Final = 256
_MAX_LIMIT: Final = 2**50
_MAX_WEIGHT: Final = 1000
_TEN_YEARS_S: Final = 3650 * 86_400.0
_PRIORITIES: Final = tuple(priority.name.lower() for priority in Priority)


@dataclass(frozen=True, slots=True)
class TenantProfile:
    """What the operator says about a tenant.

    `share` None keeps its cache entries to itself; tenants with the same `share` find each other's. `models` None
    means every model.
    """

    name: str
    share: str | None = None
    weight: float = 1.0
    priority: Priority = Priority.ONLINE
    models: tuple[str, ...] | None = None
    limits: TenantLimits = field(default_factory=TenantLimits)

    def tenant(self) -> Tenant:
        # "+" is in no name, so a shared scope never meets somebody's own
        scope = self.name if self.share is None else f"+{self.share}"
        models = None if self.models is None else frozenset(self.models)
        return Tenant(self.name, scope, models, self.weight, self.priority, self.limits)

    def document(self) -> dict[str, Any]:
        """As JSON shows it; `changed` takes the same names."""
        return {
            "name": self.name,
            "share": self.share,
            "weight": self.weight,
            "priority": self.priority.name.lower(),
            "models": None if self.models is None else list(self.models),
            **asdict(self.limits),
        }

    def changed(self, changes: Mapping[str, object]) -> TenantProfile:
        """A copy with these members of `document` changed.

        Raises:
            InvalidRequest: an unknown member, or a value of the wrong kind or size.
        """
        limits = {limit.name for limit in fields(TenantLimits)}
        known = {*self.document()} - {"name"}
        for name in changes:
            if name not in known:
                raise InvalidRequest(f"'{name[:64]}' cannot be set.", param=name[:64], code="unknown_parameter")
        merged = {**self.document(), **changes}
        return TenantProfile(
            name=self.name,
            share=None if merged["share"] is None else check_name(merged["share"], "share"),
            weight=_weight(merged["weight"]),
            priority=_priority(merged["priority"]),
            models=check_models(merged["models"]),
            limits=TenantLimits(**{name: _limit(merged[name], name) for name in limits}),
        )


def check_name(value: object, param: str) -> str:
    """1 to 64 of A-Z a-z 0-9 . _ -. Raises InvalidRequest."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidRequest(f"'{param}' must be 1 to 64 of A-Z a-z 0-9 . _ -", param=param)
    return value


def check_models(value: object) -> tuple[str, ...] | None:
    """A list as `tenancy.access` reads it, sorted, each entry once; None for every model. Raises InvalidRequest."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) and is_entry(entry) for entry in value):
        raise InvalidRequest(
            "'models' must be null or an array of names: MODEL, MODEL:ADAPTER or MODEL:*.", param="models"
        )
    if len(value) > _MAX_MODELS:
        raise InvalidRequest(f"'models' has more than {_MAX_MODELS} names.", param="models")
    return tuple(sorted(set(value)))


def check_seconds(value: object, param: str, *, shortest: float = 1.0) -> float:
    """A length of time up to ten years. Raises InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not shortest <= value <= _TEN_YEARS_S:
        raise InvalidRequest(
            f"'{param}' must be a number of seconds from {shortest:g} to {_TEN_YEARS_S:g}.", param=param
        )
    return float(value)


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_WEIGHT:
        raise InvalidRequest(f"'weight' must be a number over 0 and up to {_MAX_WEIGHT}.", param="weight")
    return float(value)


def _priority(value: object) -> Priority:
    if not isinstance(value, str) or value not in _PRIORITIES:
        raise InvalidRequest(f"'priority' must be one of {', '.join(_PRIORITIES)}.", param="priority")
    return Priority[value.upper()]


def _limit(value: object, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_LIMIT:
        raise InvalidRequest(f"'{name}' must be null or an integer from 1 to {_MAX_LIMIT}.", param=name)
    return value
