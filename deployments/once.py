"""An operation that is carried out once, however often its request is sent: the header Idempotency-Key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from omnilmm.tenancy.idempotency import IdempotencyStore, SavedAnswer, check_idempotency_key, fingerprint


def carry_out_once(
    store: IdempotencyStore, request: Request, parts: tuple[bytes, ...], carry_out: Callable[[], Mapping[str, Any]]
) -> Response:
    """What `carry_out` gives, or gave when this request came before. `parts` are what makes it the same request.

    Blocks. A refusal is not saved: the key may then be used again.

    Raises:
        InvalidRequest: the header is malformed.
        IdempotencyInProgress, IdempotencyKeyReused: see `omnilmm.tenancy.idempotency`.
    """
    key = check_idempotency_key(request.headers.get("idempotency-key"))
    if key is None:
        return _json(200, json.dumps(carry_out()).encode())
    operation = f"{request.method} {request.url.path}"
    claim = store.begin(request.state.tenant.name, operation, key, fingerprint(*parts))
    if isinstance(claim, SavedAnswer):
        return _json(claim.status, claim.body)
    try:
        answer = SavedAnswer(200, json.dumps(carry_out()).encode())
    except BaseException:
        store.abandon(claim)
        raise
    store.finish(claim, answer)
    return _json(answer.status, answer.body)


def _json(status: int, body: bytes) -> Response:
    return Response(body, status_code=status, media_type="application/json")
