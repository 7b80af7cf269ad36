"""OpenAPI descriptions of the routes, made from the models that do the checking: they cannot disagree.

FastAPI takes them as `openapi_extra` of a route whose handler reads the raw body itself (our parser is stricter than
FastAPI's). Every schema is whole in its place, without references, because FastAPI merges them where they stand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, TypeAdapter

from omnilmm.api.completion_requests import CompletionRequest
from omnilmm.api.completion_responses import Completion
from omnilmm.api.requests import ChatCompletionRequest
from omnilmm.api.response_objects import ResponseObject
from omnilmm.api.response_requests import ResponsesRequest
from omnilmm.api.responses import ChatCompletion, ErrorBody, ModelList, ModelObject
from omnilmm.api.sse import MEDIA_TYPE
from omnilmm.api.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest

_JSON = "application/json"

_ERRORS: Mapping[int, str] = MappingProxyType(
    {
        400: "A field or a picture is wrong; `param` and `code` say which and why",
        401: "No API key, or not one of ours",
        403: "The key may not do this",
        404: "Unknown model or file",
        405: "There is something here, for another method",
        413: "The body or a picture file is too large",
        415: "The body is not plain application/json",
        429: "The tenant is over a limit of its own",
        500: "A fault of the server",
        503: "No room; try again after the time in Retry-After",
        504: "The request ran out of time",
    }
)
_LOOKING_UP = (401, 403, 429, 500, 503)
_POSTING = (400, 401, 403, 404, 413, 415, 429, 500, 503)


def chat_completions_operation() -> dict[str, Any]:
    """``POST /v1/chat/completions``."""
    told = "The answer, whole or as a stream of `chat.completion.chunk` events ending in [DONE]"
    return _answering("Answer a conversation", ChatCompletionRequest, told, ChatCompletion)


def completions_operation() -> dict[str, Any]:
    """``POST /v1/completions``."""
    told = "The texts, whole or as a stream of `text_completion` events ending in [DONE]"
    return _answering("Go on with a prompt", CompletionRequest, told, Completion)


def responses_operation() -> dict[str, Any]:
    """``POST /v1/responses``."""
    told = "The response, whole or as a stream of `response.*` events"
    return _answering("Answer, in the dialect of responses", ResponsesRequest, told, ResponseObject)


ANSWERING: Mapping[str, Callable[[], dict[str, Any]]] = MappingProxyType(
    {
        "/v1/chat/completions": chat_completions_operation,
        "/v1/completions": completions_operation,
        "/v1/responses": responses_operation,
    }
)


def models_operation() -> dict[str, Any]:
    """``GET /v1/models``."""
    return _looking_up("List the models the key may use", "The models", _schema(ModelList), *_LOOKING_UP)


def model_operation() -> dict[str, Any]:
    """``GET /v1/models/{model}``."""
    return _looking_up("Describe a model", "The model", _schema(ModelObject), 404, *_LOOKING_UP)


def tokenize_operation() -> dict[str, Any]:
    """``POST /tokenize``."""
    return {
        **_looking_up("Count and list the tokens of a prompt", "The tokens", _schema(Tokenized), *_POSTING),
        **_body(TokenizeRequest),
    }


def detokenize_operation() -> dict[str, Any]:
    """``POST /detokenize``."""
    return {
        **_looking_up("Spell tokens as text", "The text", _schema(Detokenized), *_POSTING),
        **_body(DetokenizeRequest),
    }


def health_operation(*statuses: int) -> dict[str, Any]:
    """``GET /health`` and ``GET /ready``: open routes, with a `status` and nothing else."""
    schema = {
        "type": "object",
        "properties": {"status": {"type": "string"}},
        "required": ["status"],
        "additionalProperties": False,
    }
    content = {_JSON: {"schema": schema}}
    return {
        "summary": "Whether the server lives, or is ready",
        "security": [],
        "responses": {str(status): {"description": "The state", "content": content} for status in statuses},
    }


def metrics_operation() -> dict[str, Any]:
    """``GET /metrics``."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "summary": "Counters of the router that answers, for the operator",
        "responses": {
            "200": {"description": "Prometheus text format", "content": text},
            **_errors(401, 403, 500, 503),
        },
    }


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """The document FastAPI made, without what is not true of us: its own way to refuse parameters."""
    for operations in document.get("paths", {}).values():
        for operation in operations.values():
            if "HTTPValidationError" in json.dumps(operation.get("responses", {}).get("422", "")):
                del operation["responses"]["422"]
    components = document.setdefault("components", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.get("schemas", {}).pop(name, None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    return document


def _answering(summary: str, request: type[BaseModel], told: str, answer: type) -> dict[str, Any]:
    content = {_JSON: {"schema": _schema(answer)}, MEDIA_TYPE: {"schema": _event()}}
    return {
        "summary": summary,
        **_body(request),
        "responses": {"200": {"description": told, "content": content}, **_errors(*_POSTING, 504)},
    }


def _event() -> dict[str, Any]:
    """One server-sent event."""
    return {
        "type": "object",
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "description": "JSON, or [DONE]", "contentMediaType": _JSON},
        },
        "required": ["data"],
    }


def _looking_up(summary: str, told: str, schema: dict[str, Any], *statuses: int) -> dict[str, Any]:
    responses = {"200": {"description": told, "content": {_JSON: {"schema": schema}}}, **_errors(*statuses)}
    return {"summary": summary, "responses": responses}


def _body(request: type[BaseModel]) -> dict[str, Any]:
    schema = _inline(request.model_json_schema())
    return {"requestBody": {"required": True, "content": {_JSON: {"schema": schema}}}}


def _errors(*statuses: int) -> dict[str, Any]:
    content = {_JSON: {"schema": _schema(ErrorBody)}}
    return {str(status): {"description": _ERRORS[status], "content": content} for status in statuses}


def _schema(kind: type) -> dict[str, Any]:
    return _inline(TypeAdapter(kind).json_schema())


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with every ``$ref`` replaced by what it names. Our models are not recursive."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rpartition("/")[2]])
        return {name: resolve(item) for name, item in node.items() if name != "discriminator"}

    resolved: dict[str, Any] = resolve(schema)
    return resolved
