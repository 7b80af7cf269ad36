"""OpenAPI descriptions of ``/v1/files`` and ``/v1/batches``."""

from __future__ import annotations

from typing import Any

from omnilmm.api.batches import MAX_BATCHES_LISTED, BatchList, BatchObject, CreateBatchRequest
from omnilmm.api.files import (
    MAX_EXPIRES_S,
    MAX_FILES_LISTED,
    MIN_EXPIRES_S,
    PURPOSES,
    FileDeleted,
    FileList,
    FileObject,
)
from omnilmm.api.openapi import _body, _errors, _looking_up, _schema

_LOOKING = (401, 403, 404, 500, 503)
_POSTING = (400, *_LOOKING, 413, 415)
_ONCE_CODES = (
    ("409", "The same request, by its Idempotency-Key, is under way"),
    ("422", "The Idempotency-Key was used for another request"),
)


def create_file_operation() -> dict[str, Any]:
    """``POST /v1/files``."""
    seconds = {"type": "string", "pattern": "^[0-9]{4,7}$", "description": f"{MIN_EXPIRES_S} to {MAX_EXPIRES_S}"}
    form = {
        "type": "object",
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": list(PURPOSES)},
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": seconds,
        },
        "required": ["file", "purpose"],
        "additionalProperties": False,
    }
    operation = _once(_looking_up("Upload a file", "The file", _schema(FileObject), *_POSTING))
    return {
        **operation,
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
    }


def list_files_operation() -> dict[str, Any]:
    """``GET /v1/files``."""
    listed = _looking_up("List files", "The files", _schema(FileList), 400, *_LOOKING)
    purposes = {"type": "string", "enum": [*PURPOSES, "batch_output"]}
    order = {"type": "string", "enum": ["asc", "desc"], "default": "desc"}
    parameters = [*_paging(MAX_FILES_LISTED, MAX_FILES_LISTED), _query("order", order), _query("purpose", purposes)]
    return {**listed, "parameters": parameters}


def retrieve_file_operation() -> dict[str, Any]:
    """``GET /v1/files/{file_id}``."""
    return _looking_up("Describe a file", "The file", _schema(FileObject), *_LOOKING)


def file_content_operation() -> dict[str, Any]:
    """``GET /v1/files/{file_id}/content``."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    responses = {"200": {"description": "The content", "content": content}, **_errors(*_LOOKING)}
    return {"summary": "Download a file", "responses": responses}


def delete_file_operation() -> dict[str, Any]:
    """``DELETE /v1/files/{file_id}``."""
    return _looking_up("Delete a file, and what the cache knows of it", "It is gone", _schema(FileDeleted), *_LOOKING)


def create_batch_operation() -> dict[str, Any]:
    """``POST /v1/batches``."""
    operation = _once(_looking_up("Hand in a batch", "The batch, in validation", _schema(BatchObject), *_POSTING))
    return {**operation, **_body(CreateBatchRequest)}


def list_batches_operation() -> dict[str, Any]:
    """``GET /v1/batches``."""
    listed = _looking_up("List batches", "The batches", _schema(BatchList), 400, *_LOOKING)
    return {**listed, "parameters": _paging(MAX_BATCHES_LISTED, 20)}


def retrieve_batch_operation() -> dict[str, Any]:
    """``GET /v1/batches/{batch_id}``."""
    return _looking_up("Describe a batch", "The batch", _schema(BatchObject), *_LOOKING)


def cancel_batch_operation() -> dict[str, Any]:
    """``POST /v1/batches/{batch_id}/cancel``."""
    return _looking_up("Cancel a batch", "The batch, being cancelled", _schema(BatchObject), 400, *_LOOKING)


def _once(operation: dict[str, Any]) -> dict[str, Any]:
    """The operation, with the header that lets it be sent again safely."""
    error = operation["responses"]["500"]["content"]
    told = {code: {"description": words, "content": error} for code, words in _ONCE_CODES}
    key = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
    header = {"name": "Idempotency-Key", "in": "header", "required": False, "schema": key}
    return {**operation, "parameters": [header], "responses": {**operation["responses"], **told}}


def _paging(most: int, default: int) -> list[dict[str, Any]]:
    limit = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return [_query("after", {"type": "string", "minLength": 1, "maxLength": 64}), _query("limit", limit)]


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}
