"""From a good body to the record the flow takes, and the bound on everything a body may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from omnilmm.api.completion_requests import CompletionRequest
from omnilmm.api.fields import Caller
from omnilmm.api.requests import ChatCompletionRequest, parse_chat_request
from omnilmm.api.response_requests import ResponsesRequest
from omnilmm.api.tokens import DetokenizeRequest, TokenizeRequest
from omnilmm.messages import ChatRequest, Conversation, Grammar, GrammarKind, ImagePart, Priority, TextPart, Turn


def convert(document: dict[str, Any], **caller: Any) -> ChatRequest:
    """The one request in a body, with references to pictures as their bytes."""
    parsed = parse_chat_request(json.dumps(document).encode())
    files = {param: reference.encode() for reference, param in parsed.pictures()}
    (request,) = parsed.to_requests(Caller("r-1", **caller), files)
    return request


def picture(url: str, **more: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def test_a_bare_request_leaves_everything_to_the_model(good):
    assert convert(good) == ChatRequest(
        request_id="r-1", conversation=Conversation((Turn("user", (TextPart("What is this?"),)),))
    )


def test_every_field_arrives(good):
    sampling = {
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "logit_bias": {"7": -100, "0": 0.5},
        "seed": 2**63 - 1,
        "stop": ["\n", "###"],
        "stop_token_ids": [2, 32000],
        "min_tokens": 3,
        "max_tokens": 64,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 20,
        "metadata": {"run": "7"},
        "user": "someone",
        "safety_identifier": "someone",
        "prompt_cache_key": "these",
        "n": 3,
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "response_format": {"type": "text"},
    }
    request = convert(good | sampling, tenant="acme", scope="s", weight=2.0, priority=Priority.BATCH, timeout_s=5.0)
    assert request == ChatRequest(
        request_id="r-1",
        conversation=Conversation((Turn("user", (TextPart("What is this?"),)),)),
        max_tokens=64,
        temperature=1.0,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logit_bias=((7, -100.0), (0, 0.5)),
        seed=2**63 - 1,
        stop=("\n", "###"),
        stop_ids=(2, 32000),
        min_tokens=3,
        ignore_eos=True,
        logprobs=20,
        tenant="acme",
        scope="s",
        weight=2.0,
        priority=Priority.BATCH,
        timeout_s=5.0,
        session="these",
        metadata=(("run", "7"),),
    )
    assert isinstance(request.temperature, float)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"max_completion_tokens": 9}, "max_tokens", 9),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 0}, "top_k", 0),
        ({"stop": "x" * 256}, "stop", ("x" * 256,)),
        ({"stop": []}, "stop", ()),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": False}, "logprobs", None),
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"top_p": 1}, "top_p", 1.0),
        ({"seed": 0}, "seed", 0),
        ({"min_tokens": 5, "max_tokens": 5}, "min_tokens", 5),
    ],
)
def test_other_spellings(good, changes, field, value):
    assert getattr(convert(good | changes), field) == value


def test_a_conversation_keeps_its_order_and_its_places():
    document = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {
                "role": "user",
                "content": [picture("one", detail="low"), {"type": "text", "text": "a"}, picture("two", detail=None)],
            },
            {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": ""},
                    picture("three"),
                    {"type": "file", "file": {"file_id": "file-4"}},
                ],
            },
        ],
    }
    one, two, three = (f"messages[{i}].content[{j}].image_url.url" for i, j in ((2, 0), (2, 2), (4, 1)))
    four = "messages[4].content[2].file.file_id"
    assert convert(document).conversation.turns == (
        Turn("system", (TextPart("Be brief."),)),
        Turn("system", (TextPart("Be kind."),)),
        Turn("user", (ImagePart(b"one", one), TextPart("a"), ImagePart(b"two", two))),
        Turn("assistant", (TextPart("b"),)),
        Turn("user", (TextPart(""), ImagePart(b"three", three), ImagePart(b"file-4", four))),
    )
    pictures = list(parse_chat_request(json.dumps(document).encode()).pictures())
    assert pictures == [("one", one), ("two", two), ("three", three), ("file-4", four)]


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar(GrammarKind.JSON_OBJECT)),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "title": "引"}}},
            Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object","title":"引"}'),
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True, "description": "d"}},
            Grammar(GrammarKind.JSON_SCHEMA, "{}"),
        ),
    ],
)
def test_forms_of_answers(good, form, grammar):
    assert convert(good | {"response_format": form}).grammar == grammar


def test_the_session_of_a_header_comes_before_the_cache_key(good):
    assert convert(good | {"prompt_cache_key": "body"}, session="header").session == "header"


@pytest.mark.parametrize("text", ["", "   ", "\x00\x1b[31m\ufffe\r\n\u202e", "<image></s><|user|>", "引\U0001f600"])
def test_texts_arrive_as_typed(good, text):  # T01, T03
    request = convert(good | {"messages": [{"role": "user", "content": text}]})
    assert request.conversation.turns[0].text == text


def test_sixteen_pictures_and_a_thousand_turns_are_welcome(good):  # I20, R03
    turn = {"role": "user", "content": [picture("same")] * 16}
    assert len(convert(good | {"messages": [turn]}).conversation.images) == 16
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 1000
    assert len(convert(good | {"messages": turns}).conversation.turns) == 2000


def test_streaming_and_its_options(good):
    def parse(**changes: object) -> ChatCompletionRequest:
        return parse_chat_request(json.dumps(good | changes).encode())

    assert not parse().stream
    assert not parse(stream=True).include_usage
    assert not parse(stream=True, stream_options={"include_usage": False}).include_usage
    assert parse(stream=True, stream_options={"include_usage": True}).include_usage


def test_a_heavy_picture_passes_through_untouched(heavy_body):
    parsed = parse_chat_request(heavy_body)
    ((url, param),) = parsed.pictures()
    assert param == "messages[0].content[1].image_url.url"
    assert len(url) > 20 * 2**20


def test_a_parsed_request_cannot_be_changed(good):
    parsed = parse_chat_request(json.dumps(good).encode())
    with pytest.raises(ValueError, match="frozen"):
        parsed.model = "other"


# -- every count is bounded ---------------------------------------------------------------------------


def subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for keyword in ("properties", "patternProperties", "$defs"):
        yield from schema.get(keyword, {}).items()
    for keyword in ("anyOf", "oneOf"):
        yield from ((f"{keyword}[{i}]", option) for i, option in enumerate(schema.get(keyword, ())))
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            yield keyword, schema[keyword]


def is_bounded(schema: dict[str, Any]) -> bool:
    if schema.keys() & {"enum", "const", "$ref", "anyOf", "oneOf"}:
        return True
    match schema.get("type"):
        case "boolean" | "null":
            return True
        case "integer" | "number":
            return bool(
                schema.keys() & {"minimum", "exclusiveMinimum"} and schema.keys() & {"maximum", "exclusiveMaximum"}
            )
        case "string":
            return "maxLength" in schema
        case "array":
            return "maxItems" in schema and "items" in schema
        case "object" if "properties" in schema:
            return schema.get("additionalProperties") is False
        case "object":
            return "maxProperties" in schema and "maxLength" in schema.get("propertyNames", {})
    return False


def unbounded(schema: dict[str, Any], place: str = "$") -> Iterator[str]:
    """Places of a JSON schema that set no limit to a number, a string, an array or an object."""
    if not is_bounded(schema):
        yield place
    for name, inner in subschemas(schema):
        yield from unbounded(inner, f"{place}.{name}")


@pytest.mark.parametrize(
    "kind", [ChatCompletionRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest]
)
def test_every_count_bounded(kind):
    assert list(unbounded(kind.model_json_schema())) == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 0},
        {"anyOf": [{"type": "number", "maximum": 1}, {"type": "null"}]},
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "maxLength": 3}},
        {"type": "array", "maxItems": 2, "items": {"type": "string"}},
        {"type": "array", "maxItems": 2},
        {},
        {"type": "object", "properties": {"a": {"type": "boolean"}}},
        {"type": "object", "additionalProperties": False, "properties": {"a": {"type": "string"}}},
        {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
        {"$defs": {"A": {"type": "integer"}}, "$ref": "#/$defs/A"},
    ],
)
def test_the_walk_sees_what_is_not_bounded(schema):
    assert list(unbounded(schema))
