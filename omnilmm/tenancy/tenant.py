"""A tenant: who asks, what they may use, and how much of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from omnilmm.errors import NotFound
from omnilmm.messages import Priority
from omnilmm.tenancy.access import opens


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """How much a tenant may use. None means as much as there is.

    `requests_per_min`, `tokens_per_min` (prompt and answer together) and `image_pixels_per_min` (of the pictures as
    sent) are rates with a burst of one minute. `cache_bytes` are the picture vectors the tenant may have in the
    cache: beyond it, pictures are still answered but not kept.
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    image_pixels_per_min: int | None = None
    concurrent_requests: int | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer, seen through one of its keys.

    `scope` separates its cache entries: tenants of one scope can find each other's. `models` is a list as
    `tenancy.access` reads it, None means every model; what the key itself narrows is already left out. `weight` is its
    share when tenants compete, `priority` the class its requests wait in. `key_id` names the key, for receipts; it is
    no secret.
    """

    name: str
    scope: str
    models: frozenset[str] | None = None
    weight: float = 1.0
    priority: Priority = Priority.ONLINE
    limits: TenantLimits = field(default_factory=TenantLimits)
    key_id: str = ""

    def may_use(self, model: str) -> bool:
        return self.models is None or opens(self.models, model)

    def check_model(self, model: str, served: Iterable[str]) -> None:
        """Raises NotFound, worded the same whether the model does not exist or is not this tenant's."""
        if model not in served or not self.may_use(model):
            raise NotFound(
                "The model does not exist or you do not have access to it.", param="model", code="model_not_found"
            )
