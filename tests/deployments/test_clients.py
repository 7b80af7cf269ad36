"""Clients that people use, against the routes over a real socket."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from http_fakes import Decoder, make_card, make_flow, make_service
from live_server import live
from pydantic import BaseModel

from omnilmm.errors import Overloaded
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Tenant, new_key

MODEL = "omnilmm-3b"
KEY, DIGEST = new_key()
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def url(data: Path, decoder: Decoder) -> Iterator[str]:
    keys = KeyBook([KeyRecord(DIGEST, Tenant("acme", "acme"))])
    with live(make_service({MODEL: make_flow(make_card(data, MODEL), decoder)}, keys=keys)) as base:
        yield f"{base}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def picture(data: Path) -> str:
    return "data:image/png;base64," + base64.b64encode((data / "images" / "coins_gray.png").read_bytes()).decode()


# -- OpenAI's ----------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI, data: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": picture(data)}}, {"type": "text", "text": "How many?"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert len(answer.choices) == 2
    assert len(answer.choices[1].logprobs.content[0].top_logprobs) == 2
    assert answer.usage.prompt_tokens > 64
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    assert raw.status_code == 200
    assert raw.parse().choices[0].message.content


def test_a_stream_of_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
    with client.chat.completions.stream(model=MODEL, messages=HELLO, temperature=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    chunks = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
    )
    *_, last = chunks
    assert last.usage.completion_tokens == 12


def test_a_form(client: openai.OpenAI, decoder: Decoder) -> None:
    class Answer(BaseModel):
        number: int

    with pytest.raises((openai.LengthFinishReasonError, ValueError)):  # what the fake says is not JSON
        client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Answer)
    schema = json.loads(decoder.calls[0].sampling.grammar.source)
    assert schema["properties"]["number"]["type"] == "integer"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["Hello", "Good day"], logprobs=1, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs.text_offset[0] == 0
    pieces = [c.text for chunk in client.completions.create(model=MODEL, prompt="Hello", stream=True, temperature=0)
              for c in chunk.choices]  # fmt: skip
    assert "".join(pieces) == answer.choices[0].text


def test_responses(client: openai.OpenAI, data: Path) -> None:
    content = [
        {"type": "input_image", "image_url": picture(data), "detail": "auto"},
        {"type": "input_text", "text": "?"},
    ]
    items: list = [{"role": "user", "content": content}]
    answer = client.responses.create(model=MODEL, input=items, instructions="Be brief.", store=False)
    assert answer.status == "completed"
    assert answer.output_text
    items += answer.output  # a conversation goes on with what was answered
    items.append({"role": "user", "content": "And now?"})
    assert client.responses.create(model=MODEL, input=items).output_text
    with client.responses.stream(model=MODEL, input="Hello", temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == client.responses.create(model=MODEL, input="Hello", temperature=0).output_text
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="Hello", previous_response_id=answer.id)
    assert caught.value.param == "previous_response_id"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_errors_are_the_clients_own(client: openai.OpenAI, url: str, decoder: Decoder) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "decimal_above_max_value")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0).models.list()
    decoder.failures[0] = (0, Overloaded("Busy.", retry_after=1))
    with pytest.raises(openai.InternalServerError) as busy:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert busy.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("dialect", ["chat", "completions"])
def test_a_stream_that_fails_raises(client: openai.OpenAI, decoder: Decoder, dialect: str) -> None:
    decoder.failures[0] = (2, Overloaded("Busy."))
    if dialect == "chat":
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    else:
        stream = client.completions.create(model=MODEL, prompt="Hello", stream=True)
    with pytest.raises(openai.APIError, match="Busy"):
        list(stream)


def test_a_response_that_fails_says_so(client: openai.OpenAI, decoder: Decoder) -> None:
    decoder.failures[0] = (2, Overloaded("Busy."))
    *_, error, last = client.responses.create(model=MODEL, input="Hello", stream=True)
    assert (error.type, error.message) == ("error", "Busy.")
    assert (last.type, last.response.status) == ("response.failed", "failed")


async def test_the_asynchronous_client(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == answer.choices[0].message.content
        events = [event async for event in await client.responses.create(model=MODEL, input="Hello", stream=True)]
        assert events[-1].type == "response.completed"
        async with client.chat.completions.with_streaming_response.create(model=MODEL, messages=HELLO) as raw:
            assert (await raw.parse()).choices[0].message.content == answer.choices[0].message.content


# -- others ------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(url: str) -> None:
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True})

    def curl(*options: str) -> str:
        command = ["curl", "-sS", "-N", f"{url}/chat/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body]
        return subprocess.run([*command, *options], check=True, capture_output=True, text=True, timeout=60).stdout

    assert curl("-H", "Content-Type: application/json").endswith("data: [DONE]\n\n")
    assert json.loads(curl())["error"]["code"] == "unsupported_media_type"  # curl says it is a form


def test_langchain(url: str, data: Path) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, temperature=0)
    answer = model.invoke("Hello")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 6
    assert "".join(chunk.content for chunk in model.stream("Hello")) == answer.content
    image = {"type": "image_url", "image_url": {"url": picture(data)}}
    assert model.invoke([("human", [image, {"type": "text", "text": "?"}])]).content
    newer = langchain.ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, temperature=0, use_responses_api=True)
    assert newer.invoke("Hello").text


async def test_langchain_without_waiting(url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, temperature=0)
    assert "".join([chunk.content async for chunk in model.astream("Hello")]) == (await model.ainvoke("Hello")).content


def test_litellm(url: str) -> None:
    litellm = pytest.importorskip("litellm")
    asked = {"model": f"openai/{MODEL}", "messages": HELLO, "api_base": url, "api_key": KEY, "temperature": 0}
    answer = litellm.completion(**asked)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))
    assert text == answer.choices[0].message.content
    with pytest.raises(litellm.exceptions.BadRequestError):
        litellm.completion(**asked | {"temperature": 3})
