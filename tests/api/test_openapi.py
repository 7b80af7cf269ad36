"""The description of the routes says what the code does."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from omnilmm.api.openapi import chat_completions_operation, models_operation
from omnilmm.api.requests import ChatCompletionRequest, parse_chat_request
from omnilmm.api.responses import Answer, Heading, chat_completion, model_list, model_object
from omnilmm.errors import InvalidRequest, RateLimited
from omnilmm.messages import FinishReason, Usage


@pytest.fixture(scope="module")
def operation() -> dict[str, Any]:
    return chat_completions_operation()


def validator(body: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(body["content"]["application/json"]["schema"])


def test_schemas_are_whole_and_valid(operation):
    for described in (
        operation["requestBody"],
        *operation["responses"].values(),
        *models_operation()["responses"].values(),
    ):
        assert "$ref" not in json.dumps(described)
        for content in described["content"].values():
            jsonschema.Draft202012Validator.check_schema(content["schema"])


def test_every_field_is_described(operation):
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() == ChatCompletionRequest.model_fields.keys()
    assert sorted(schema["required"]) == ["messages", "model"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n": 1},
        {"n": 2},
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
    validator(operation["responses"]["429"]).validate(RateLimited("Slow down.").body())
    validator(models_operation()["responses"]["200"]).validate(model_list([model_object("m", created=1)]))
