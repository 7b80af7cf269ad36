"""``/v1/batches`` on the wire: OpenAI's `batch` objects, and the body that asks for one.

`usage` has one extension, as chat completions have: `images`, how many pictures the answered lines held and how many of
them were sent through the vision tower for this batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from omnilmm.api.files import MAX_EXPIRES_S, MIN_EXPIRES_S
from omnilmm.api.refusals import validate
from omnilmm.errors import InvalidRequest

MAX_BATCHES_LISTED, DEFAULT_BATCHES_LISTED = 100, 20


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class OutputExpiresAfter(_Strict):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRES_S, le=MAX_EXPIRES_S)]


class CreateBatchRequest(_Strict):
    input_file_id: Annotated[str, Field(min_length=1, max_length=64)]
    endpoint: Annotated[str, Field(min_length=1, max_length=64)]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    output_expires_after: OutputExpiresAfter | None = None


def parse_create_batch(document: Mapping[str, object], endpoints: Sequence[str]) -> CreateBatchRequest:
    """Check a body; `endpoints` are those that batches can ask here.

    Raises:
        InvalidRequest: with the `code` OpenAI uses and the exact place as `param`.
    """
    parsed = validate(CreateBatchRequest, document, frozenset())
    if parsed.endpoint not in endpoints:
        raise InvalidRequest(f"'endpoint' must be one of {', '.join(endpoints)}.", param="endpoint")
    return parsed


class BatchErrorObject(TypedDict):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(TypedDict):
    object: Literal["list"]
    data: list[BatchErrorObject]


class RequestCounts(TypedDict):
    total: int
    completed: int
    failed: int


class InputTokensDetails(TypedDict):
    cached_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ImagesUsage(TypedDict):
    total: int
    encoded: int


class BatchUsageObject(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    images: ImagesUsage


class BatchObject(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsageObject
    metadata: Mapping[str, str] | None


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_list(batches: Iterable[BatchObject], *, has_more: bool) -> BatchList:
    data = list(batches)
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
