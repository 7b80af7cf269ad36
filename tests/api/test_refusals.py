"""The catalogue of bad requests (tests/bad_requests.py) at the parser: every wrong field gives 400, the code OpenAI
uses, and the exact place."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from bad_requests import CANARY, CASES, user

from omnilmm.api.fields import MAX_TEXT_CHARS
from omnilmm.api.requests import ChatCompletionRequest, parse_chat_request
from omnilmm.errors import ContextLengthExceeded, InvalidRequest


def refused(document: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(json.dumps(document, separators=(",", ":")).encode())
    error = caught.value
    assert error.status == 400
    assert error.type == "invalid_request_error"
    assert 0 < len(error.message) <= 512
    assert CANARY not in json.dumps(error.body())
    assert not re.search(r"0x[0-9a-f]{6,}|/usr/|Traceback|pydantic", json.dumps(error.body()))
    return error


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [pytest.param(*case, id=f"{row}-{i}") for i, (row, *case) in enumerate(CASES)],
)
def test_the_catalogue(good, changes, code, param):
    """Changes of `...` leave the field out."""
    document = {name: value for name, value in {**good, **changes}.items() if value is not ...}
    error = refused(document)
    assert (error.code, error.param) == (code, param)
    assert parse_chat_request(json.dumps(good).encode()).model == good["model"]  # nothing was left behind


def test_texts_too_long_for_any_model_are_a_matter_of_context(good):
    assert isinstance(refused(good | user("x" * (MAX_TEXT_CHARS + 1))), ContextLengthExceeded)


# -- every field, every wrong type --------------------------------------------------------------------

SAMPLES: dict[str, Any] = {
    "string": CANARY,
    "integer": 1,
    "number": 0.5,
    "boolean": True,
    "array": [CANARY],
    "object": {"k": CANARY},
    "null": None,
}


def _types(schema: dict[str, Any]) -> set[str]:
    kinds = {schema["type"]} if "type" in schema else set()
    for option in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        kinds |= _types(option if "$ref" not in option else {"type": "object"})
    return kinds | ({"integer"} if "number" in kinds else set())


def wrong_types() -> Iterator[Any]:
    for field, schema in ChatCompletionRequest.model_json_schema()["properties"].items():
        for kind in SAMPLES.keys() - _types(schema):
            yield pytest.param(field, SAMPLES[kind], id=f"P09-{field}-{kind}")


@pytest.mark.parametrize(("field", "value"), list(wrong_types()))
def test_every_field_refuses_every_wrong_type(good, field, value):
    error = refused(good | {field: value})
    assert (error.code, error.param) == ("invalid_type", field)


@pytest.mark.parametrize("field", ChatCompletionRequest.model_fields)
def test_null_means_left_out_where_a_field_is_optional(good, field):
    if ChatCompletionRequest.model_fields[field].is_required():
        assert refused(good | {field: None}).param == field
    else:
        assert parse_chat_request(json.dumps(good | {field: None}).encode())


# -- which of many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"zzz":1,"n":0,"model":3}', "zzz"),
        ('{"n":0,"zzz":1,"model":3}', "n"),
        ('{"model":3,"n":0,"zzz":1}', "model"),
        ('{"messages":[{"content":3,"role":"user","zzz":1}],"model":3}', "messages[0].content"),
        ('{"messages":[{"zzz":1,"role":"user","content":3}],"model":3}', "messages[0].zzz"),
        ('{"messages":[{"role":"user","content":"a"},{"role":"user"}],"n":0}', "messages[1].content"),
        ('{"metadata":{"a":"b","c":1},"logit_bias":{"x":1}}', "metadata.c"),
        ('{"messages":[{"role":"user","content":"a"}]}', "model"),
    ],
)
def test_the_first_fault_in_the_document_is_told(body, param):
    assert refused(json.loads(body)).param == param


def test_a_thousand_faults_cost_no_more_than_a_few():
    junk = {f"k{i}": CANARY for i in range(1000)}
    part = {"type": "image_url", **junk, "image_url": {"url": "x", **junk}}
    document = {"messages": [{"role": "user", **junk, "content": [part] * 20}], **junk, "logit_bias": junk}
    body = json.dumps(document).encode()
    times = []
    for _ in range(5):
        begun = time.thread_time()
        with pytest.raises(InvalidRequest) as caught:
            parse_chat_request(body)
        times.append(time.thread_time() - begun)
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "messages[0].k0")
    assert min(times) < 0.2
