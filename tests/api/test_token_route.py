"""``/tokenize`` and ``/detokenize``: their bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from omnilmm.api.tokens import parse_detokenize_request, parse_tokenize_request, tokenized
from omnilmm.errors import InvalidRequest
from omnilmm.messages import Conversation, ImagePart, TextPart, Turn


def body(**document: Any) -> bytes:
    return json.dumps({"model": "m", **document}).encode()


def test_pictures_are_counted_and_not_looked_at():
    picture = {"type": "image_url", "image_url": {"url": "anything"}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "a"}]}]
    part = ImagePart(b"", "messages[0].content[0].image_url.url")
    assert parse_tokenize_request(body(messages=messages)).conversation() == Conversation(
        (Turn("user", (part, TextPart("a"))),)
    )
    assert parse_tokenize_request(body(prompt="a")).conversation() is None


@pytest.mark.parametrize(
    ("document", "code", "param"),
    [
        ({}, "invalid_value", "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_value", "prompt"),
        ({"prompt": 3}, "invalid_type", "prompt"),
        ({"messages": []}, "missing_required_parameter", "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "invalid_type", "messages[0].content"),
        ({"prompt": "a", "return_token_strs": 1}, "invalid_type", "return_token_strs"),
        ({"prompt": "a", "add_special_tokens": True}, "unknown_parameter", "add_special_tokens"),
    ],
)
def test_bad_bodies(document, code, param):
    with pytest.raises(InvalidRequest) as caught:
        parse_tokenize_request(body(**document))
    assert (caught.value.code, caught.value.param) == (code, param)


def test_tokens_must_be_ids():
    assert parse_detokenize_request(body(tokens=[1, 2])).tokens == (1, 2)
    for tokens in ([-1], [1.5], ["a"], [True], 3, None):
        with pytest.raises(InvalidRequest):
            parse_detokenize_request(body(tokens=tokens))


def test_what_is_answered():
    assert tokenized((1, 2), max_context=9, image_tokens=0, texts=["a", "b"]) == {
        "count": 2,
        "max_model_len": 9,
        "tokens": [1, 2],
        "token_strs": ["a", "b"],
        "image_tokens": 0,
    }
