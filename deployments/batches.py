"""``/v1/batches``: hand in, list, look at and cancel a tenant's batches. The work itself is `deployments.batch`'s."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from fastapi import APIRouter, Depends, Request, Response

from deployments.answering import read_json_body
from deployments.once import carry_out_once
from omnilmm.api.batches import (
    DEFAULT_BATCHES_LISTED,
    MAX_BATCHES_LISTED,
    BatchObject,
    CreateBatchRequest,
    batch_list,
    parse_create_batch,
)
from omnilmm.api.files import parse_list_query
from omnilmm.api.openapi_files import (
    cancel_batch_operation,
    create_batch_operation,
    list_batches_operation,
    retrieve_batch_operation,
)
from omnilmm.batch.desk import BatchDesk
from omnilmm.batch.states import Batch
from omnilmm.tenancy.idempotency import IdempotencyStore

MAX_BODY_BYTES = 64 * 1024
LISTING = frozenset({"after", "limit"})


class BatchService(Protocol):
    """What the routes need of the router behind them. `batch_endpoints` are the paths a line may name."""

    desk: BatchDesk
    batch_endpoints: Sequence[str]
    idempotency: IdempotencyStore


def batch_object(batch: Batch) -> BatchObject:
    """The record as OpenAI spells it."""
    errors = [
        {"code": error.code, "line": error.line, "message": error.message, "param": error.param}
        for error in batch.errors
    ]
    usage = batch.usage
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,  # type: ignore[typeddict-item]
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": {
            "total": batch.counts.total,
            "completed": batch.counts.completed,
            "failed": batch.counts.failed,
        },
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "images": {"total": usage.images, "encoded": usage.encoded},
        },
        "metadata": dict(batch.metadata) or None,
    }


def add_routes(routes: APIRouter, service: BatchService) -> None:
    """Add the routes to a router whose dependencies have put the tenant into `request.state`."""

    async def read(request: Request) -> CreateBatchRequest:
        return parse_create_batch(await read_json_body(request, MAX_BODY_BYTES), service.batch_endpoints)

    reading = Depends(read)

    @routes.post("/v1/batches", openapi_extra=create_batch_operation())
    def create_batch(request: Request, asked: CreateBatchRequest = reading) -> Response:
        expires = asked.output_expires_after
        submit = partial(
            service.desk.submit,
            request.state.tenant.name,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            metadata=asked.metadata,
            output_expires_after=None if expires is None else expires.seconds,
        )
        parts = (asked.model_dump_json().encode(),)
        return carry_out_once(service.idempotency, request, parts, lambda: dict(batch_object(submit())))

    @routes.get("/v1/batches", openapi_extra=list_batches_operation())
    def list_batches(request: Request) -> dict[str, Any]:
        query = parse_list_query(
            request.query_params.multi_items(),
            max_limit=MAX_BATCHES_LISTED,
            default_limit=DEFAULT_BATCHES_LISTED,
            names=LISTING,
        )
        page = service.desk.batches.list(request.state.tenant.name, after=query.after, limit=query.limit)
        return dict(batch_list(map(batch_object, page.items), has_more=page.has_more))

    @routes.get("/v1/batches/{batch_id}", openapi_extra=retrieve_batch_operation())
    def retrieve_batch(batch_id: str, request: Request) -> dict[str, Any]:
        return dict(batch_object(service.desk.batches.get(request.state.tenant.name, batch_id)))

    @routes.post("/v1/batches/{batch_id}/cancel", openapi_extra=cancel_batch_operation())
    def cancel_batch(batch_id: str, request: Request) -> dict[str, Any]:
        return dict(batch_object(service.desk.batches.cancel(request.state.tenant.name, batch_id)))
