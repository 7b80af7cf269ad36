"""The catalogue of bad requests: what is sent, and the error it must meet. Told to the parser, to the routes, and to a
live cluster.

The ids of the cases are the rows of the catalogue: I pictures, D data: URIs, U remote URLs, T text, R roles,
P parameters, H HTTP.
"""

from __future__ import annotations

from typing import Any

from omnilmm.api.fields import MAX_TEXT_CHARS
from omnilmm.api.formats import MAX_SCHEMA_BYTES
from omnilmm.api.requests import MAX_MESSAGES, MAX_PARTS

CANARY = "canary-7d1e"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def user(content: object, **more: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


def part(**changes: object) -> dict[str, Any]:
    return user([{"type": "text", "text": "?"}, {**PICTURE, **changes}])


def schema_format(**changes: object) -> dict[str, Any]:
    """A `response_format` with changes to its inner object; `...` leaves a member out."""
    inner = {name: value for name, value in {"name": "a", "schema": {}, **changes}.items() if value is not ...}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


IMAGES = [
    ("I21", user([{"type": "image_embeds", "image_embeds": CANARY}]), "invalid_value", "messages[0].content[0].type"),
    ("I21", {"prompt_embeds": CANARY}, "unknown_parameter", "prompt_embeds"),
    ("I21", {"image_embeds": CANARY}, "unknown_parameter", "image_embeds"),
    ("I21", {"mm_processor_kwargs": {"x": CANARY}}, "unknown_parameter", "mm_processor_kwargs"),
    ("I21", {"uuid": CANARY}, "unknown_parameter", "uuid"),
    ("I21", part(uuid=CANARY), "unknown_parameter", "messages[0].content[1].uuid"),
    ("I22", user([{"type": "image_url"}]), "missing_required_parameter", "messages[0].content[0].image_url"),
    ("I22", part(image_url={}), "missing_required_parameter", "messages[0].content[1].image_url.url"),
    ("I22", part(image_url=None), "invalid_type", "messages[0].content[1].image_url"),
    ("I22", part(image_url=CANARY), "invalid_type", "messages[0].content[1].image_url"),
    ("I22", part(image_url={"url": 3}), "invalid_type", "messages[0].content[1].image_url.url"),
    ("I22", part(image_url={"url": None}), "invalid_type", "messages[0].content[1].image_url.url"),
    (
        "I22",
        part(image_url={"url": CANARY, "file_id": CANARY}),
        "unknown_parameter",
        "messages[0].content[1].image_url.file_id",
    ),
    ("I22", part(file_id=CANARY), "unknown_parameter", "messages[0].content[1].file_id"),
    (
        "I22",
        part(image_url={"url": "x", "detail": CANARY}),
        "invalid_value",
        "messages[0].content[1].image_url.detail",
    ),
    ("I22", part(image_url={"url": "x", "detail": 1}), "invalid_type", "messages[0].content[1].image_url.detail"),
    ("I22", user([{"type": "file", "file": {}}]), "missing_required_parameter", "messages[0].content[0].file.file_id"),
    (
        "I22",
        user([{"type": "file", "file": {"file_id": "../" + CANARY}}]),
        "invalid_value",
        "messages[0].content[0].file.file_id",
    ),
    (
        "I22",
        user([{"type": "file", "file": {"file_data": CANARY}}]),
        "unknown_parameter",
        "messages[0].content[0].file.file_data",
    ),
    (
        "I22",
        {"messages": [{"role": "system", "content": [PICTURE]}]},
        "invalid_value",
        "messages[0].content[0].type",
    ),
    (
        "I22",
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, PICTURE]}]},
        "invalid_value",
        "messages[0].content[1].type",
    ),
]

TEXTS = [
    ("T01", user(None), "invalid_value", "messages[0].content"),
    ("T01", user([]), "invalid_value", "messages[0].content"),
    ("T01", {"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    ("T01", {"messages": [{"role": "assistant", "content": None}]}, "invalid_value", "messages[0].content"),
    ("T01", user(3), "invalid_type", "messages[0].content"),
    ("T01", user({"text": CANARY}), "invalid_type", "messages[0].content"),
    ("T01", user([{"type": "text", "text": None}]), "invalid_type", "messages[0].content[0].text"),
    ("T02", user("\ud800"), "invalid_value", "messages[0].content"),
    ("T02", user([{"type": "text", "text": "a\udfff"}]), "invalid_value", "messages[0].content[0].text"),
    ("T02", {"model": "\ud800"}, "invalid_value", "model"),
    ("T02", {"stop": ["a", "\ud800"]}, "invalid_value", "stop[1]"),
    ("T02", {"metadata": {"a": "\ud800"}}, "invalid_value", "metadata.a"),
    ("T02", {"metadata": {"\ud800": "a"}}, "invalid_value", "metadata"),
    ("T04", user("x" * (MAX_TEXT_CHARS + 1)), "context_length_exceeded", "messages[0].content"),
    (
        "T04",
        user([{"type": "text", "text": "x" * (MAX_TEXT_CHARS + 1)}]),
        "context_length_exceeded",
        "messages[0].content[0].text",
    ),
]

ROLES = [
    ("R01", {"messages": ...}, "missing_required_parameter", "messages"),
    ("R01", {"messages": []}, "missing_required_parameter", "messages"),
    ("R01", {"messages": None}, "invalid_type", "messages"),
    ("R01", {"messages": {}}, "invalid_type", "messages"),
    ("R01", {"messages": CANARY}, "invalid_type", "messages"),
    ("R01", {"messages": [CANARY]}, "invalid_type", "messages[0]"),
    ("R01", {"messages": [None]}, "invalid_type", "messages[0]"),
    ("R02", {"messages": [{"role": CANARY, "content": "a"}]}, "invalid_value", "messages[0].role"),
    ("R02", {"messages": [{"role": "tool", "content": "a"}]}, "invalid_value", "messages[0].role"),
    ("R02", {"messages": [{"role": 3, "content": "a"}]}, "invalid_type", "messages[0].role"),
    ("R02", {"messages": [{"role": None, "content": "a"}]}, "invalid_type", "messages[0].role"),
    ("R02", {"messages": [{"content": "a"}]}, "missing_required_parameter", "messages[0].role"),
    ("R02", user("a", name=CANARY), "unknown_parameter", "messages[0].name"),
    (
        "R02",
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": CANARY}]}]},
        "unsupported_value",
        "messages[0].tool_calls",
    ),
    (
        "R03",
        {"messages": [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)},
        "array_above_max_length",
        "messages",
    ),
    ("R03", {"messages": [{"role": "user", "content": "a"}] * 1_000_000}, "array_above_max_length", "messages"),
    (
        "R03",
        user([{"type": "text", "text": "a"}] * (MAX_PARTS + 1)),
        "array_above_max_length",
        "messages[0].content",
    ),
    ("R03", user([{"type": CANARY, "text": "a"}]), "invalid_value", "messages[0].content[0].type"),
    ("R03", user([{"type": None, "text": "a"}]), "invalid_type", "messages[0].content[0].type"),
    ("R03", user([{"text": "a"}]), "missing_required_parameter", "messages[0].content[0].type"),
    ("R03", user(["a"]), "invalid_type", "messages[0].content[0]"),
    ("R03", user([[{"type": "text", "text": "a"}]]), "invalid_type", "messages[0].content[0]"),
    ("R03", user([{"type": "text", "text": [{"type": "text"}]}]), "invalid_type", "messages[0].content[0].text"),
]

PARAMETERS = [
    ("P01", {"temperature": float("nan")}, "invalid_value", "temperature"),
    ("P01", {"temperature": float("inf")}, "invalid_value", "temperature"),
    ("P01", {"temperature": -float("inf")}, "invalid_value", "temperature"),
    ("P01", {"temperature": -1}, "decimal_below_min_value", "temperature"),
    ("P01", {"temperature": 2.01}, "decimal_above_max_value", "temperature"),
    ("P01", {"temperature": "1"}, "invalid_type", "temperature"),
    ("P01", {"temperature": True}, "invalid_type", "temperature"),
    ("P02", {"n": float("nan")}, "invalid_value", "n"),
    ("P02", {"max_tokens": float("nan")}, "invalid_value", "max_tokens"),
    ("P02", {"seed": float("inf")}, "invalid_value", "seed"),
    ("P03", {"n": 0}, "integer_below_min_value", "n"),
    ("P03", {"n": -1}, "integer_below_min_value", "n"),
    ("P03", {"n": 10**9}, "integer_above_max_value", "n"),
    ("P03", {"n": 1e9}, "invalid_type", "n"),
    ("P03", {"n": 1.0}, "invalid_type", "n"),
    ("P03", {"n": 2.5}, "invalid_type", "n"),
    ("P03", {"n": True}, "invalid_type", "n"),
    ("P03", {"n": "3"}, "invalid_type", "n"),
    ("P03", {"n": 17}, "integer_above_max_value", "n"),
    ("P03", {"best_of": 2}, "unknown_parameter", "best_of"),
    ("P04", {"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ("P04", {"max_tokens": -1}, "integer_below_min_value", "max_tokens"),
    ("P04", {"max_tokens": 2**63}, "integer_above_max_value", "max_tokens"),
    ("P04", {"max_tokens": 10**30}, "invalid_value", "max_tokens"),
    ("P04", {"max_completion_tokens": 0}, "integer_below_min_value", "max_completion_tokens"),
    ("P04", {"max_completion_tokens": 5, "max_tokens": 5}, "invalid_value", "max_tokens"),
    ("P04", {"min_tokens": 6, "max_tokens": 5}, "invalid_value", "min_tokens"),
    ("P04", {"min_tokens": -1}, "integer_below_min_value", "min_tokens"),
    ("P05", {"top_p": 0}, "decimal_below_min_value", "top_p"),
    ("P05", {"top_p": 1.1}, "decimal_above_max_value", "top_p"),
    ("P05", {"min_p": -0.1}, "decimal_below_min_value", "min_p"),
    ("P05", {"min_p": 1.1}, "decimal_above_max_value", "min_p"),
    ("P05", {"top_k": -2}, "integer_below_min_value", "top_k"),
    ("P05", {"top_k": 10**6}, "integer_above_max_value", "top_k"),
    ("P05", {"presence_penalty": 1e9}, "decimal_above_max_value", "presence_penalty"),
    ("P05", {"frequency_penalty": -1e9}, "decimal_below_min_value", "frequency_penalty"),
    ("P05", {"repetition_penalty": 1e9}, "decimal_above_max_value", "repetition_penalty"),
    ("P05", {"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
    ("P05", {"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    ("P05", {"logprobs": True, "top_logprobs": -1}, "integer_below_min_value", "top_logprobs"),
    ("P05", {"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ("P05", {"logprobs": 2}, "invalid_type", "logprobs"),
    ("P06", {"stop": ["a"] * 1000}, "array_above_max_length", "stop"),
    ("P06", {"stop": ["a"] * 5}, "array_above_max_length", "stop"),
    ("P06", {"stop": ""}, "string_below_min_length", "stop"),
    ("P06", {"stop": ["a", ""]}, "string_below_min_length", "stop[1]"),
    ("P06", {"stop": "x" * 10**6}, "string_above_max_length", "stop"),
    ("P06", {"stop": ["x" * 257]}, "string_above_max_length", "stop[0]"),
    ("P06", {"stop": 3}, "invalid_type", "stop"),
    ("P06", {"stop": [3]}, "invalid_type", "stop[0]"),
    ("P06", {"stop": [None]}, "invalid_type", "stop[0]"),
    ("P06", {"stop_token_ids": [0] * 65}, "array_above_max_length", "stop_token_ids"),
    ("P06", {"stop_token_ids": [1, -1]}, "integer_below_min_value", "stop_token_ids[1]"),
    ("P07", {"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
    ("P07", {"logit_bias": {"abc": 1}}, "invalid_value", "logit_bias"),
    ("P07", {"logit_bias": {"01": 1}}, "invalid_value", "logit_bias"),
    ("P07", {"logit_bias": {"1\n": 1}}, "invalid_value", "logit_bias"),
    ("P07", {"logit_bias": {"1": 101}}, "decimal_above_max_value", "logit_bias.1"),
    ("P07", {"logit_bias": {"1": float("inf")}}, "invalid_value", "logit_bias.1"),
    ("P07", {"logit_bias": {str(i): 1 for i in range(1025)}}, "object_above_max_properties", "logit_bias"),
    ("P08", {"seed": -1}, "integer_below_min_value", "seed"),
    ("P08", {"seed": 2**63}, "integer_above_max_value", "seed"),
    ("P08", {"seed": 2**64}, "integer_above_max_value", "seed"),
    ("P08", {"seed": 1.5}, "invalid_type", "seed"),
    ("P09", {"zzz": CANARY}, "unknown_parameter", "zzz"),
    ("P09", {CANARY + "!": 1}, "unknown_parameter", None),
    ("P09", {"x" * 100_000: 1}, "unknown_parameter", None),
    ("P09", {"stream": True, "stream_options": {"zzz": 1}}, "unknown_parameter", "stream_options.zzz"),
    ("P09", user("a", **{CANARY + "!": 1}), "unknown_parameter", "messages[0]"),
    ("P09", {"metadata": {str(i): "" for i in range(17)}}, "object_above_max_properties", "metadata"),
    ("P09", {"metadata": {"k" * 65: ""}}, "property_name_above_max_length", "metadata"),
    ("P09", {"metadata": {"k": "v" * 513}}, "string_above_max_length", "metadata.k"),
    ("P09", {"metadata": {"text": "v" * 513}}, "string_above_max_length", "metadata.text"),
    ("P09", {"metadata": {"k": 1}}, "invalid_type", "metadata.k"),
    ("P09", {"metadata": {"k": {"k": CANARY}}}, "invalid_type", "metadata.k"),
    ("P09", {"user": "u" * 2**20}, "string_above_max_length", "user"),
    ("P09", {"model": ""}, "string_below_min_length", "model"),
    ("P09", {"model": "m" * 257}, "string_above_max_length", "model"),
    ("P09", {"model": None}, "invalid_type", "model"),
    ("P09", {"model": ...}, "missing_required_parameter", "model"),
    *(
        ("P12", {name: CANARY}, "unknown_parameter", name)
        for name in [
            "tools",
            "tool_choice",
            "functions",
            "function_call",
            "parallel_tool_calls",
            "audio",
            "prediction",
            "reasoning_effort",
            "verbosity",
            "web_search_options",
            "chat_template",
            "chat_template_kwargs",
            "cache_salt",
            "guided_json",
            "guided_regex",
            "guided_grammar",
            "guided_choice",
            "structured_outputs",
            "echo",
            "add_generation_prompt",
            "prompt",
            "logits_processors",
            "lora_request",
            "priority",
            "skip_special_tokens",
            "use_beam_search",
        ]
    ),
    (
        "P12",
        {"response_format": {"type": "json_schema", "json_schema": {"a": CANARY}}},
        "unknown_parameter",
        "response_format.json_schema.a",
    ),
    ("P12", {"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
    ("P12", schema_format(name="a b"), "invalid_value", "response_format.json_schema.name"),
    ("P12", schema_format(name="x" * 65), "string_above_max_length", "response_format.json_schema.name"),
    ("P12", schema_format(schema=...), "missing_required_parameter", "response_format.json_schema.schema"),
    ("P12", schema_format(schema=[CANARY]), "invalid_type", "response_format.json_schema.schema"),
    ("P12", schema_format(schema=None), "invalid_type", "response_format.json_schema.schema"),
    ("P12", schema_format(document={}), "unknown_parameter", "response_format.json_schema.document"),
    ("P12", schema_format(strict="yes"), "invalid_type", "response_format.json_schema.strict"),
    (
        "P12",
        schema_format(schema={"title": CANARY * MAX_SCHEMA_BYTES}),
        "invalid_value",
        "response_format.json_schema.schema",
    ),
    (
        "P12",
        schema_format(schema={"x" * 513: 1}),
        "property_name_above_max_length",
        "response_format.json_schema.schema",
    ),
    ("P12", {"prompt_cache_key": ""}, "string_below_min_length", "prompt_cache_key"),
    ("P12", {"safety_identifier": "x" * 257}, "string_above_max_length", "safety_identifier"),
    ("P12", {"response_format": {"type": CANARY}}, "invalid_value", "response_format.type"),
    ("P12", {"response_format": {}}, "missing_required_parameter", "response_format.type"),
    ("P12", {"modalities": ["text", "audio"]}, "unsupported_value", "modalities"),
    ("P12", {"modalities": [CANARY]}, "invalid_value", "modalities[0]"),
    ("P12", {"service_tier": "priority"}, "unsupported_value", "service_tier"),
    ("P12", {"service_tier": CANARY}, "invalid_value", "service_tier"),
    ("P12", {"store": True}, "unsupported_value", "store"),
    ("P14", {"stream": "yes"}, "invalid_type", "stream"),
    ("P14", {"stream": 1}, "invalid_type", "stream"),
    ("P14", {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ("P14", {"stream": False, "stream_options": {}}, "invalid_value", "stream_options"),
    ("P14", {"stream": True, "stream_options": True}, "invalid_type", "stream_options"),
    (
        "P14",
        {"stream": True, "stream_options": {"include_usage": "yes"}},
        "invalid_type",
        "stream_options.include_usage",
    ),
]

CASES = [*IMAGES, *TEXTS, *ROLES, *PARAMETERS]
"""(row, changes to a good body, code, param); a change to `...` leaves the field out."""
