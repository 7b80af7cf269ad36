"""OpenAPI descriptions of the routes, made from the models that do the checking: they cannot disagree.

FastAPI takes them as `openapi_extra` of a route whose handler reads the raw body itself (our parser is stricter than
FastAPI's). Every schema is whole in its place, without references, because FastAPI merges them where they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from omnilmm.api.requests import ChatCompletionRequest
from omnilmm.api.responses import ChatCompletion, ErrorBody, ModelList
from omnilmm.api.sse import MEDIA_TYPE

_JSON = "application/json"

_ERRORS: Mapping[int, str] = {
    400: "A field or a picture is wrong; `param` and `code` say which and why",
    401: "No API key, or not one of ours",
    403: "The key may not do this",
    404: "Unknown model",
    413: "The body or a picture file is too large",
    415: "The body is not plain application/json",
    429: "The tenant is over a limit of its own",
    500: "A fault of the server",
    503: "No room; try again after the time in Retry-After",
    504: "The request ran out of time",
}


def chat_completions_operation() -> dict[str, Any]:
    """``POST /v1/chat/completions``."""
    return {
        "requestBody": {
            "required": True,
            "content": {_JSON: {"schema": _inline(ChatCompletionRequest.model_json_schema())}},
        },
        "responses": {
            "200": {
                "description": "The answer, whole or as a stream of `chat.completion.chunk` events ending in [DONE]",
                "content": {_JSON: {"schema": _schema(ChatCompletion)}, MEDIA_TYPE: {"schema": {"type": "string"}}},
            },
            **_errors(*_ERRORS),
        },
    }


def models_operation() -> dict[str, Any]:
    """``GET /v1/models``."""
    return {
        "responses": {
            "200": {"description": "The models served", "content": {_JSON: {"schema": _schema(ModelList)}}},
            **_errors(401, 403, 429, 500, 503),
        }
    }


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
