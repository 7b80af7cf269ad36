"""``/v1/completions``: what its body may say, and what is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from omnilmm.api.completion_requests import CompletionRequest, parse_completion_request
from omnilmm.api.completion_responses import CompletionRendering
from omnilmm.api.fields import Caller
from omnilmm.api.responses import Answer, Heading
from omnilmm.api.sse import EventReader
from omnilmm.errors import InvalidRequest, Overloaded
from omnilmm.messages import Conversation, Delta, FinishReason, Grammar, GrammarKind, TextLogprob, Usage

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, image_tokens=0)


def parse(**document: Any) -> CompletionRequest:
    return parse_completion_request(json.dumps({"model": "m", **document}).encode())


def events(*parts: Any) -> list[Any]:
    data = [event.data for event in EventReader().feed(b"".join(b"".join(part) for part in parts))]
    return [json.loads(text) if text != "[DONE]" else text for text in data]


@pytest.mark.parametrize(
    ("prompt", "raws"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_every_form_of_prompt(prompt, raws):
    requests = parse(prompt=prompt).to_requests(Caller("r"), {})
    assert [request.raw for request in requests] == raws
    assert all(request.conversation == Conversation(()) for request in requests)
    assert len({request.request_id for request in requests}) == len(requests)
    assert requests[0].request_id == "r"


def test_fields_arrive():
    (request,) = parse(
        prompt="a", max_tokens=5, logprobs=2, seed=3, stop="x", response_format={"type": "json_object"}, echo=False
    ).to_requests(Caller("r", tenant="t"), {})
    assert (request.max_tokens, request.logprobs, request.seed, request.stop) == (5, 2, 3, ("x",))
    assert (request.grammar, request.tenant) == (Grammar(GrammarKind.JSON_OBJECT), "t")


def test_sixteen_tokens_unless_told_otherwise():
    (request,) = parse(prompt="a").to_requests(Caller("r"), {})
    assert request.max_tokens == 16
    assert request.logprobs is None


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"prompt": ...}, "missing_required_parameter", "prompt"),
        ({"prompt": None}, "invalid_type", "prompt"),
        ({"prompt": {}}, "invalid_type", "prompt"),
        ({"prompt": []}, "array_below_min_length", "prompt"),
        ({"prompt": [[]]}, "array_below_min_length", "prompt[0]"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt[1]"),
        ({"prompt": ["a", 1]}, "invalid_type", "prompt[1]"),
        ({"prompt": [[1], 2]}, "invalid_type", "prompt[1]"),
        ({"prompt": [True]}, "invalid_type", "prompt[0]"),
        ({"prompt": [-1]}, "integer_below_min_value", "prompt[0]"),
        ({"prompt": [10**6]}, "integer_above_max_value", "prompt[0]"),
        ({"prompt": ["a"] * 65}, "array_above_max_length", "prompt"),
        ({"prompt": "x" * (1 << 20) + "x"}, "context_length_exceeded", "prompt"),
        ({"prompt": ["a", "x" * (1 << 20) + "x"]}, "context_length_exceeded", "prompt[1]"),
        ({"echo": True}, "unsupported_value", "echo"),
        ({"suffix": "b"}, "unsupported_value", "suffix"),
        ({"best_of": 2}, "unknown_parameter", "best_of"),
        ({"messages": []}, "unknown_parameter", "messages"),
        ({"max_completion_tokens": 4}, "unknown_parameter", "max_completion_tokens"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"logprobs": 21}, "integer_above_max_value", "logprobs"),
        ({"prompt": ["a"] * 5, "n": 13}, "invalid_value", "n"),
        ({"min_tokens": 17}, "invalid_value", "min_tokens"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
    ],
)
def test_bad_fields(changes, code, param):
    document = {name: value for name, value in {"prompt": "a", **changes}.items() if value is not ...}
    with pytest.raises(InvalidRequest) as caught:
        parse(**document)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_errors_of_the_flow_are_told_in_our_terms():
    body = parse(prompt="a")
    assert [body.place(param) for param in ("messages", "messages[0].content", "prompt", "logit_bias", None)] == [
        "prompt",
        "prompt",
        "prompt",
        "logit_bias",
        None,
    ]


def test_a_whole_answer():
    logprobs = (
        TextLogprob("ab", b"ab", -0.5, (("ab", b"ab", -0.5), ("c", b"c", -1.0))),
        TextLogprob("引", "引".encode(), float("-inf"), ()),
    )
    whole = CompletionRendering(Heading("r", "m", 7, "fp"), False).whole(
        [Answer("ab引", FinishReason.STOP, logprobs), Answer("", FinishReason.LENGTH)], USAGE
    )
    assert whole["id"] == "cmpl-r"
    assert whole["object"] == "text_completion"
    first, second = whole["choices"]
    assert first["logprobs"] == {
        "tokens": ["ab", "引"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"ab": -0.5, "c": -1.0}, {}],
        "text_offset": [0, 2],
    }
    assert second == {"index": 1, "text": "", "logprobs": None, "finish_reason": "length"}
    assert whole["usage"]["total_tokens"] == 5


def test_a_stream_counts_on_from_delta_to_delta():
    rendering = CompletionRendering(Heading("r", "m", 7), include_usage=True)
    token = TextLogprob("ab", b"ab", -0.5, ())
    told = events(
        rendering.begin(),
        rendering.delta(0, Delta("ab", (token,))),
        rendering.delta(1, Delta("xy", (token,))),
        rendering.delta(0, Delta("ab", (token,))),
        rendering.finish(0, FinishReason.STOP),
        rendering.finish(1, FinishReason.LENGTH),
        rendering.end(USAGE),
    )
    offsets = [c["logprobs"]["text_offset"] for e in told[:3] for c in e["choices"]]
    assert offsets == [[0], [0], [2]]
    assert [e["choices"][0]["finish_reason"] for e in told[3:5]] == ["stop", "length"]
    assert told[5]["choices"] == []
    assert told[5]["usage"]["completion_tokens"] == 2
    assert told[6] == "[DONE]"
    assert all(event["usage"] is None for event in told[:5])


def test_a_stream_that_fails_ends_with_the_error():
    rendering = CompletionRendering(Heading("r", "m", 7), include_usage=False)
    told = events(rendering.delta(0, Delta("a")), rendering.fail(Overloaded("Busy.")))
    assert told[-1]["error"]["code"] == "overloaded"
    assert "usage" not in told[0]
