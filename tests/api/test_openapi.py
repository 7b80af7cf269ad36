"""The description of the routes says what the code does."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from omnilmm.api.completion_requests import CompletionRequest
from omnilmm.api.completion_responses import CompletionRendering
from omnilmm.api.openapi import (
    ANSWERING,
    chat_completions_operation,
    complete,
    completions_operation,
    detokenize_operation,
    health_operation,
    metrics_operation,
    model_operation,
    models_operation,
    responses_operation,
    tokenize_operation,
)
from omnilmm.api.requests import ChatCompletionRequest, parse_chat_request
from omnilmm.api.response_objects import Echo, ResponseRendering
from omnilmm.api.response_requests import ResponsesRequest
from omnilmm.api.responses import Answer, Heading, chat_completion, model_list, model_object
from omnilmm.errors import InvalidRequest, RateLimited
from omnilmm.messages import FinishReason, Usage


@pytest.fixture(scope="module")
def operation() -> dict[str, Any]:
    return chat_completions_operation()


def validator(body: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(body["content"]["application/json"]["schema"])


@pytest.mark.parametrize(
    "described",
    [
        *(make() for make in ANSWERING.values()),
        *(models_operation(), model_operation(), tokenize_operation(), detokenize_operation(), metrics_operation()),
        health_operation(200, 503),
    ],
)
def test_schemas_are_whole_and_valid(described):
    assert "$ref" not in json.dumps(described)
    parts = [*described["responses"].values(), *([described["requestBody"]] if "requestBody" in described else [])]
    for part in parts:
        for content in part["content"].values():
            jsonschema.Draft202012Validator.check_schema(content["schema"])


def test_every_field_is_described(operation):
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() == ChatCompletionRequest.model_fields.keys()
    assert sorted(schema["required"]) == ["messages", "model"]
    for described, kind in ((completions_operation(), CompletionRequest), (responses_operation(), ResponsesRequest)):
        schema = described["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"].keys() == kind.model_fields.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n": 1},
        {"n": 17},
        {"n": "1"},
        {"store": False},
        {"store": True},
        {"temperature": 0},
        {"temperature": 2.5},
        {"top_p": 0},
        {"stop": "a"},
        {"stop": ["a", "b"]},
        {"stop": [""]},
        {"logit_bias": {"12": 1}},
        {"logit_bias": {"x": 1}},
        {"metadata": {"k": "v"}},
        {"metadata": {"k" * 65: "v"}},
        {"modalities": ["text"]},
        {"modalities": ["audio"]},
        {"service_tier": "auto"},
        {"service_tier": "flex"},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"x": 1}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "document": {}}}},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "assistant", "content": "a", "refusal": None}]},
        {"messages": [{"role": "assistant", "content": "a", "refusal": "b"}]},
        {"tools": []},
    ],
)
def test_schema_and_parser_agree(operation, good, changes):
    document = good | changes
    try:
        parse_chat_request(json.dumps(document).encode())
    except InvalidRequest:
        is_taken = False
    else:
        is_taken = True
    assert validator(operation["requestBody"]).is_valid(document) == is_taken


def test_responses_are_as_described(operation):
    completion = chat_completion(Heading("r", "m", 1), [Answer("a", FinishReason.STOP)], Usage(1, 1, 0, 0))
    validator(operation["responses"]["200"]).validate(completion)
    answer, usage = Answer("a", FinishReason.LENGTH), Usage(1, 1, 0, 0)
    text = CompletionRendering(Heading("r", "m", 1), False).whole([answer], usage)
    validator(completions_operation()["responses"]["200"]).validate(text)
    response = ResponseRendering(Heading("r", "m", 1), Echo()).whole([answer], usage)
    validator(responses_operation()["responses"]["200"]).validate(response)
    validator(operation["responses"]["429"]).validate(RateLimited("Slow down.").body())
    validator(models_operation()["responses"]["200"]).validate(model_list([model_object("m", created=1)]))


def test_what_the_framework_adds_and_we_do_not_have_is_taken_out():
    document = {
        "paths": {
            "/a": {"get": {"responses": {"200": {}, "422": {"$ref": "#/components/schemas/HTTPValidationError"}}}},
            "/b": {"get": {"responses": {"422": {"description": "ours"}}}},
        },
        "components": {"schemas": {"HTTPValidationError": {}, "ValidationError": {}, "Other": {}}},
    }
    assert complete(document) == {
        "paths": {
            "/a": {"get": {"responses": {"200": {}}}},
            "/b": {"get": {"responses": {"422": {"description": "ours"}}}},
        },
        "components": {
            "schemas": {"Other": {}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
