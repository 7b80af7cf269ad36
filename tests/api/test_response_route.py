"""``/v1/responses``: what its body may say, the object that is answered, and its events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from omnilmm.api.fields import Caller
from omnilmm.api.response_objects import Echo, ResponseRendering
from omnilmm.api.response_requests import ResponsesRequest, parse_responses_request
from omnilmm.api.responses import Answer, Heading
from omnilmm.api.sse import Event, EventReader
from omnilmm.errors import ImageError, InvalidRequest, Overloaded, RateLimited
from omnilmm.messages import (
    Conversation,
    Delta,
    FinishReason,
    Grammar,
    GrammarKind,
    ImagePart,
    TextLogprob,
    TextPart,
    Turn,
    Usage,
)

USAGE = Usage(prompt_tokens=70, completion_tokens=2, cached_tokens=1, image_tokens=64)
PICTURE = {"type": "input_image", "image_url": "data:x"}
WORDS = {"type": "input_text", "text": "What?"}


def parse(**document: Any) -> ResponsesRequest:
    return parse_responses_request(json.dumps({"model": "m", "input": "a", **document}).encode())


def conversation(**document: Any) -> Conversation:
    body = parse(**document)
    files = {param: reference.encode() for reference, param in body.pictures()}
    (request,) = body.to_requests(Caller("r"), files)
    return request.conversation


def user(*content: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def read(*parts: Any) -> list[Event]:
    return EventReader().feed(b"".join(b"".join(part) for part in parts))


def test_a_text_is_a_message_of_the_user():
    assert conversation(input="a") == Conversation((Turn("user", (TextPart("a"),)),))


def test_items_become_turns():
    document = [
        {"role": "developer", "content": [WORDS]},
        {
            "role": "user",
            "type": "message",
            "content": [PICTURE, WORDS, {**PICTURE, "image_url": "two", "detail": "low"}],
        },
        {
            "type": "message",
            "id": "msg_r",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "A cat.", "annotations": [], "logprobs": []}],
        },
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [{"type": "input_image", "file_id": "file-9"}]},
    ]
    assert conversation(input=document).turns == (
        Turn("system", (TextPart("What?"),)),
        Turn(
            "user",
            (
                ImagePart(b"data:x", "input[1].content[0].image_url"),
                TextPart("What?"),
                ImagePart(b"two", "input[1].content[2].image_url"),
            ),
        ),
        Turn("assistant", (TextPart("A cat."),)),
        Turn("assistant", (TextPart("Two."),)),
        Turn("user", (ImagePart(b"file-9", "input[4].content[0].file_id"),)),
    )


def test_instructions_come_first_and_are_one_system_message():
    assert conversation(input="a", instructions="Be brief.").turns[0] == Turn("system", (TextPart("Be brief."),))
    opening = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]
    first, second = conversation(input=opening, instructions="Be brief.").turns
    assert first.text == "Be brief.\n\nBe kind."
    assert second.text == "a"


@pytest.mark.parametrize(
    ("document", "told", "place"),
    [
        ({"input": "a"}, "messages[0].content", "input"),
        ({"input": "a"}, "messages", "input"),
        ({"input": user(WORDS)}, "messages[0].role", "input[0].role"),
        ({"input": user(WORDS), "instructions": "b"}, "messages[1].role", "input[0].role"),
        ({"input": user(WORDS), "instructions": "b"}, "messages[0].content", "instructions"),
        ({"input": user(WORDS)}, "response_format", "text.format"),
        ({"input": user(WORDS)}, "max_tokens", "max_output_tokens"),
        ({"input": user(WORDS)}, "input[0].content[0].image_url", "input[0].content[0].image_url"),
        ({"input": user(WORDS)}, None, None),
    ],
)
def test_errors_of_the_flow_are_told_in_our_terms(document, told, place):
    assert parse(**document).place(told) == place


def test_fields_arrive():
    body = parse(
        max_output_tokens=9,
        temperature=0,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        text={"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}},
        store=False,
        truncation="disabled",
        previous_response_id=None,
    )
    (request,) = body.to_requests(Caller("r"), {})
    assert (request.max_tokens, request.temperature, request.logprobs) == (9, 0.0, 2)
    assert request.grammar == Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input": ...}, "missing_required_parameter", "input"),
        ({"input": []}, "missing_required_parameter", "input"),
        ({"input": None}, "invalid_type", "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "missing_required_parameter", "input[0].role"),
        ({"input": [{"role": "tool", "content": "x"}]}, "invalid_value", "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "type": "reasoning"}]}, "invalid_value", "input[0].type"),
        ({"input": user()}, "invalid_value", "input[0].content"),
        ({"input": user({"type": "input_file"})}, "invalid_value", "input[0].content[0].type"),
        ({"input": user({"type": "input_image"})}, "invalid_value", "input[0].content[0]"),
        ({"input": user({**PICTURE, "file_id": "file-1"})}, "invalid_value", "input[0].content[0]"),
        ({"input": user({"type": "input_image", "file_id": "x"})}, "invalid_value", "input[0].content[0].file_id"),
        ({"input": user({**PICTURE, "uuid": "x"})}, "unknown_parameter", "input[0].content[0].uuid"),
        ({"input": [{"role": "system", "content": [PICTURE]}]}, "invalid_value", "input[0].content[0].type"),
        ({"input": "x" * (1 << 20) + "x"}, "context_length_exceeded", "input"),
        ({"instructions": "x" * (1 << 20) + "x"}, "context_length_exceeded", "instructions"),
        ({"store": True}, "unsupported_value", "store"),
        ({"background": True}, "unsupported_value", "background"),
        ({"previous_response_id": "resp_1"}, "unsupported_value", "previous_response_id"),
        ({"conversation": "conv_1"}, "unsupported_value", "conversation"),
        ({"truncation": "auto"}, "unsupported_value", "truncation"),
        ({"tools": []}, "unknown_parameter", "tools"),
        ({"reasoning": {}}, "unknown_parameter", "reasoning"),
        ({"n": 2}, "unknown_parameter", "n"),
        ({"max_tokens": 2}, "unknown_parameter", "max_tokens"),
        ({"include": ["reasoning.encrypted_content"]}, "invalid_value", "include[0]"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "missing_required_parameter",
            "text.format.schema",
        ),
        ({"text": {"verbosity": "high"}}, "unsupported_value", "text.verbosity"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "unsupported_value",
            "stream_options.include_obfuscation",
        ),
        ({"min_tokens": 5, "max_output_tokens": 4}, "invalid_value", "min_tokens"),
    ],
)
def test_bad_fields(changes, code, param):
    document = {name: value for name, value in {"input": "a", **changes}.items() if value is not ...}
    with pytest.raises(InvalidRequest) as caught:
        parse_responses_request(json.dumps({"model": "m", **document}).encode())
    assert (caught.value.code, caught.value.param) == (code, param)


# -- what is answered ---------------------------------------------------------------------------------

HEADING = Heading("r", "m", 7, "fp")
LOGPROB = TextLogprob("a", b"a", -0.5, (("a", b"a", -0.5),))


def test_a_whole_response():
    body = parse(
        instructions="b", temperature=0.5, metadata={"k": "v"}, user="u", text={"format": {"type": "json_object"}}
    )
    whole = body.rendering(HEADING).whole([Answer("A cat.", FinishReason.STOP)], USAGE)
    response = Response.model_validate(whole)
    assert response.output_text == "A cat."
    assert response.status == "completed"
    assert response.id == "resp_r"
    assert (response.instructions, response.temperature, response.metadata, response.user) == (
        "b",
        0.5,
        {"k": "v"},
        "u",
    )
    assert whole["text"] == {"format": {"type": "json_object"}}
    assert whole["store"] is False
    assert whole["usage"]["input_tokens_details"] == {"cached_tokens": 1, "cache_write_tokens": 0, "image_tokens": 64}
    assert (whole["usage"]["input_tokens"], whole["usage"]["total_tokens"]) == (70, 72)


def test_an_answer_cut_by_its_length_is_incomplete():
    whole = ResponseRendering(HEADING, Echo()).whole([Answer("A", FinishReason.LENGTH)], USAGE)
    assert whole["status"] == whole["output"][0]["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_schema_is_echoed_as_it_was_sent():
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object", "x": None}, "strict": True}
    whole = parse(text={"format": form}).rendering(HEADING).whole([Answer("{}", FinishReason.STOP)], USAGE)
    assert whole["text"]["format"] == form


def test_what_we_answer_is_taken_back():
    whole = ResponseRendering(HEADING, Echo()).whole([Answer("A cat.", FinishReason.STOP, (LOGPROB,))], USAGE)
    items = [{"role": "user", "content": "a"}, *whole["output"], {"role": "user", "content": "b"}]
    assert [turn.text for turn in conversation(input=items).turns] == ["a", "A cat.", "b"]


def test_a_stream_is_as_openai_describes_it():
    rendering = ResponseRendering(HEADING, Echo())
    told = read(
        rendering.begin(),
        rendering.delta(0, Delta("A ", (LOGPROB,))),
        rendering.delta(0, Delta("cat.")),
        rendering.finish(0, FinishReason.STOP),
        rendering.end(USAGE),
    )
    events = [json.loads(event.data) for event in told]
    assert (
        [event["type"] for event in events]
        == [event.name for event in told]
        == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    )
    assert [event["sequence_number"] for event in events] == list(range(10))
    known = TypeAdapter(ResponseStreamEvent)
    assert [known.validate_python(event).type for event in events] == [event["type"] for event in events]
    assert events[6]["text"] == "A cat."
    assert len(events[6]["logprobs"]) == 1
    whole = ResponseRendering(HEADING, Echo()).whole([Answer("A cat.", FinishReason.STOP, (LOGPROB,))], USAGE)
    assert events[-1]["response"] == whole


def test_a_stream_cut_by_its_length_ends_incomplete():
    rendering = ResponseRendering(HEADING, Echo())
    *_, last = read(rendering.begin(), rendering.finish(0, FinishReason.LENGTH), rendering.end(USAGE))
    assert last.name == "response.incomplete"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("Busy."), "server_error"),
        (RateLimited("Slow down."), "rate_limit_exceeded"),
        (InvalidRequest("No."), "invalid_prompt"),
        (ImageError("No.", code="image_too_large"), "image_too_large"),
    ],
)
def test_a_stream_that_fails_says_so(error, code):
    rendering = ResponseRendering(HEADING, Echo())
    *_, told, last = read(rendering.begin(), rendering.delta(0, Delta("A")), rendering.fail(error))
    known = TypeAdapter(ResponseStreamEvent)
    assert known.validate_python(json.loads(told.data)).type == "error"
    assert json.loads(told.data)["code"] == error.code
    assert last.name == "response.failed"
    assert json.loads(last.data)["response"]["error"] == {"code": code, "message": error.message}
