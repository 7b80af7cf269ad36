"""Our objects, judged by the official client: its models, and the client itself over a fake connection."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from omnilmm.api import responses
from omnilmm.api.requests import parse_chat_request
from omnilmm.api.responses import Answer, ChunkWriter, Heading, chat_completion, model_list, model_object
from omnilmm.api.sse import DONE, MEDIA_TYPE, encode_error, encode_event
from omnilmm.errors import InvalidRequest, Overloaded
from omnilmm.messages import Delta, FinishReason, ImageSource, ImageUsage, TextLogprob, Usage

HEADING = Heading("r-1", "omnilmm-12b", 1_700_000_000, "fp")
USAGE = Usage(
    prompt_tokens=90,
    completion_tokens=3,
    cached_tokens=64,
    image_tokens=64,
    images=(ImageUsage(ImageSource.KV, 64), ImageUsage(ImageSource.ENCODED, 64, 640, 480)),
)
ENTRIES = (
    TextLogprob("A", b"A", -0.25, (("A", b"A", -0.25), ("\ufffd", b"\xe5", float("-inf")))),
    TextLogprob("猫", "猫".encode(), float("-inf"), ()),
)
DELTAS = (Delta("A", ENTRIES[:1]), Delta(" 猫\n", ENTRIES[1:]))


def whole(*, logprobs: bool = True, num_answers: int = 1) -> dict[str, Any]:
    answer = Answer.collect(DELTAS, FinishReason.STOP, logprobs=logprobs)
    return json.loads(json.dumps(chat_completion(HEADING, [answer] * num_answers, USAGE), allow_nan=False))


def test_a_whole_answer():
    completion = ChatCompletion.model_validate(whole(), strict=True)
    assert completion.id == "chatcmpl-r-1"
    assert completion.object == "chat.completion"
    assert completion.created == 1_700_000_000
    assert completion.model == "omnilmm-12b"
    assert completion.system_fingerprint == "fp"
    choice = completion.choices[0]
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", "A 猫\n", None)
    assert completion.usage is not None
    assert completion.usage.total_tokens == 93
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 64


def test_the_usage_tells_of_every_picture():
    assert whole()["usage"] == {
        "prompt_tokens": 90,
        "completion_tokens": 3,
        "total_tokens": 93,
        "prompt_tokens_details": {"cached_tokens": 64, "image_tokens": 64},
        "images": [
            {"source": "kv", "tokens": 64, "width": None, "height": None},
            {"source": "encoded", "tokens": 64, "width": 640, "height": 480},
        ],
    }


def test_log_probabilities_are_numbers_and_bytes():
    choice = ChatCompletion.model_validate(whole(), strict=True).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("A", -0.25, [65])
    assert [(top.token, top.logprob, top.bytes) for top in first.top_logprobs] == [
        ("A", -0.25, [65]),
        ("\ufffd", -9999.0, [0xE5]),
    ]
    assert (second.logprob, bytes(second.bytes or ())) == (-9999.0, "猫".encode())


def test_log_probabilities_only_where_asked_for():
    assert whole(logprobs=False)["choices"][0]["logprobs"] is None
    empty = Answer.collect([], FinishReason.LENGTH, logprobs=True)
    completion = chat_completion(HEADING, [empty], USAGE)
    assert completion["choices"][0]["logprobs"] == {"content": [], "refusal": None}
    assert completion["choices"][0]["finish_reason"] == "length"


def test_several_answers_are_numbered():
    assert [choice["index"] for choice in whole(num_answers=3)["choices"]] == [0, 1, 2]


def chunks(writer: ChunkWriter) -> list[dict[str, Any]]:
    stream = [writer.first(), *(writer.delta(delta) for delta in DELTAS), writer.last(FinishReason.LENGTH)]
    if writer.include_usage:
        stream.append(writer.usage(USAGE))
    return [json.loads(json.dumps(chunk, allow_nan=False)) for chunk in stream]


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_answer(include_usage):
    parsed = [
        ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks(ChunkWriter(HEADING, include_usage))
    ]
    assert {(chunk.id, chunk.created, chunk.model) for chunk in parsed} == {
        ("chatcmpl-r-1", 1_700_000_000, "omnilmm-12b")
    }
    if include_usage:
        *parsed, usage = parsed
        assert usage.choices == []
        assert usage.usage is not None
        assert usage.usage.total_tokens == 93
    assert all(chunk.usage is None for chunk in parsed)
    choices = [chunk.choices[0] for chunk in parsed]
    assert [choice.delta.role for choice in choices] == ["assistant", None, None, None]
    assert "".join(choice.delta.content or "" for choice in choices) == "A 猫\n"
    assert [choice.finish_reason for choice in choices] == [None, None, None, "length"]
    logprobs = [entry.token for choice in choices if choice.logprobs for entry in choice.logprobs.content or ()]
    assert logprobs == ["A", "猫"]


def test_usage_is_null_in_every_other_chunk_if_asked_for_and_absent_if_not():
    assert all("usage" not in chunk for chunk in chunks(ChunkWriter(HEADING)))
    assert [chunk["usage"] is None for chunk in chunks(ChunkWriter(HEADING, include_usage=True))] == [True] * 4 + [
        False
    ]


def test_models():
    listing = model_list([model_object("a", created=1), model_object("b", created=2)])
    assert [Model.model_validate(model, strict=True).id for model in listing["data"]] == ["a", "b"]
    assert listing["object"] == "list"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (responses.ChatCompletion, whole()),
        (responses.ChatCompletionChunk, chunks(ChunkWriter(HEADING, include_usage=True))[-1]),
        (responses.ChatCompletionChunk, chunks(ChunkWriter(HEADING))[0]),
        (responses.ModelList, model_list([model_object("a", created=1)])),
        (responses.ErrorBody, InvalidRequest("No.", param="n").body()),
    ],
)
def test_what_we_send_is_what_our_types_say(kind, value):
    assert TypeAdapter(kind).validate_python(value, strict=True) == value


# -- the official client, unmodified ------------------------------------------------------------------


@pytest.fixture
def connect() -> Iterator[Callable[[Callable[[httpx.Request], httpx.Response]], openai.OpenAI]]:
    clients = []

    def client(answer: Callable[[httpx.Request], httpx.Response]) -> openai.OpenAI:
        transport = httpx.Client(transport=httpx.MockTransport(answer))
        clients.append(transport)
        return openai.OpenAI(api_key="k", base_url="http://test/v1", http_client=transport, max_retries=0)

    yield client
    for transport in clients:
        transport.close()


def serve(request: httpx.Request) -> httpx.Response:
    """The smallest server that uses our parts as the router does."""
    try:
        parsed = parse_chat_request(request.content)
    except InvalidRequest as error:
        return httpx.Response(error.status, json=error.body())
    if not parsed.stream:
        return httpx.Response(200, json=whole())
    events = [encode_event(chunk) for chunk in chunks(ChunkWriter(HEADING, parsed.include_usage))]
    return httpx.Response(200, content=b"".join(events) + DONE, headers={"content-type": MEDIA_TYPE})


def test_the_client_talks_over_two_rounds(connect):
    client = connect(serve)
    messages: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "auto"}},
            ],
        }
    ]
    first = client.chat.completions.create(model="m", messages=messages, max_completion_tokens=5, seed=1)
    messages += [first.choices[0].message, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model="m", messages=messages, logprobs=True, top_logprobs=2, stop=["\n"])
    assert second.choices[0].message.content == "A 猫\n"
    assert second.usage is not None
    assert second.usage.model_extra is not None
    assert second.usage.model_extra["images"][0]["source"] == "kv"


def test_the_client_reads_a_stream(connect):
    stream = connect(serve).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "a"}], stream=True, stream_options={"include_usage": True}
    )
    received = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in received if chunk.choices) == "A 猫\n"
    assert received[-1].usage is not None


def test_the_client_gets_the_code_and_the_place(connect):
    with pytest.raises(openai.BadRequestError) as caught:
        connect(serve).chat.completions.create(
            model="m", messages=[{"role": "user", "content": "a"}], extra_body={"best_of": 2}
        )
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "best_of")


def test_the_client_raises_on_an_error_inside_a_stream(connect):
    def serve_half(request: httpx.Request) -> httpx.Response:
        events = [encode_event(chunk) for chunk in chunks(ChunkWriter(HEADING))[:2]]
        body = b"".join(events) + encode_error(Overloaded("Busy."))
        return httpx.Response(200, content=body, headers={"content-type": MEDIA_TYPE})

    stream = connect(serve_half).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "a"}], stream=True
    )
    received = []
    with pytest.raises(openai.APIError) as caught:
        received.extend(stream)
    assert caught.value.code == "overloaded"
