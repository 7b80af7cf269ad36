"""What a request took, however it ended: one receipt for all its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from omnilmm.api.choices import usage_of_choices, usage_of_prompts
from omnilmm.errors import OmniError
from omnilmm.flow import CLIENT_LEFT
from omnilmm.messages import Usage
from omnilmm.tenancy.access import split_model
from omnilmm.tenancy.tenant import Tenant
from omnilmm.tenancy.usage import Receipt


class Account:
    """What the answers of one request took, each as far as it came. `num_choices` in a row are to the same prompt."""

    def __init__(self, num_choices: int) -> None:
        self._num_choices = num_choices
        self._usages: dict[int, Usage] = {}

    def of(self, index: int) -> Callable[[Usage], None]:
        """Notes what answer `index` took."""
        return partial(self._usages.__setitem__, index)

    def total(self) -> Usage:
        """All of it; a prompt with several answers counts once."""
        prompts: dict[int, list[Usage]] = {}
        for index, usage in sorted(self._usages.items()):
            prompts.setdefault(index // self._num_choices, []).append(usage)
        totals = [choices[0] if len(choices) == 1 else usage_of_choices(choices) for choices in prompts.values()]
        return totals[0] if len(totals) == 1 else usage_of_prompts(totals)


@contextmanager
def receipt_of(
    account: Account,
    record: Callable[[Receipt], None],
    *,
    tenant: Tenant,
    model: str,
    request_id: str,
    batch_id: str | None = None,
) -> Iterator[None]:
    """Record a receipt for what happens inside, whatever becomes of it. A request that was not let in has none.

    `model` must be one we serve: names that clients make up do not belong into the records.
    """
    status = CLIENT_LEFT
    try:
        yield
        status = 200
    except Exception as error:
        status = error.status if isinstance(error, OmniError) else OmniError.status
        raise
    finally:
        base, adapter = split_model(model)
        receipt = Receipt.of(
            account.total(),
            at=time.time(),
            tenant=tenant.name,
            key_id=tenant.key_id,
            model=base,
            adapter=adapter,
            status=status,
            request_id=request_id,
            batch_id=batch_id or "",
        )
        record(receipt)
