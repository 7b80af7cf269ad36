"""Clients that people use, against a running cluster with real models."""

import asyncio
import json
import shutil
import subprocess

import httpx
import openai
import pytest
from e2e_cluster import data_uri

pytestmark = pytest.mark.e2e

MODEL = "omnilmm-3b"
GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0}}


@pytest.fixture
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", timeout=60) as made:
        yield made


@pytest.fixture
def asked(golden):
    """A reference case: messages, and what the original answers."""
    return golden(MODEL, "coins_gray.png", "empty")


def test_chat_whole_streamed_and_raw(client, asked):
    body = asked.body()
    question = {"model": MODEL, "messages": body["messages"], "max_tokens": body["max_tokens"], **GREEDY}
    answer = client.chat.completions.create(**question)
    assert answer.choices[0].message.content.strip() == asked.text
    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices).strip() == asked.text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    raw = client.chat.completions.with_raw_response.create(**question)
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content.strip() == asked.text


def test_several_choices(client, asked):
    client = client.with_options(timeout=20, max_retries=0)
    question = {"model": MODEL, "messages": asked.body()["messages"], "max_tokens": 8, "temperature": 1.2, "n": 3}
    first, again = (client.chat.completions.create(**question, seed=11) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in again.choices]
    assert first.usage.completion_tokens <= 24
    lone = client.chat.completions.create(**question | {"n": 1}, seed=11)
    assert lone.choices[0].message.content == first.choices[0].message.content
    assert lone.usage.prompt_tokens == first.usage.prompt_tokens


def test_responses_say_what_chat_says(client, asked):
    question = asked.messages[0]["content"]
    picture = {"type": "input_image", "image_url": data_uri(asked.picture), "detail": "auto"}
    items = [{"role": "user", "content": [picture, {"type": "input_text", "text": question}]}]
    more = {"model": MODEL, "max_output_tokens": asked.num_tokens, **GREEDY}
    answer = client.responses.create(input=items, **more)
    assert answer.output_text.strip() == asked.text
    first, *_, last = client.responses.create(input=items, stream=True, **more)
    assert first.type == "response.created"
    assert last.type == f"response.{answer.status}"
    assert last.response.output_text == answer.output_text
    items += [*answer.output, {"role": "user", "content": "And now?"}]
    assert client.responses.create(input=items, **more).usage.input_tokens > answer.usage.input_tokens


def test_completions_and_tokens(client, cluster):
    asked = {"model": MODEL, "prompt": "The cat", "max_tokens": 6, **GREEDY}
    words = client.completions.create(**asked)
    tokenize = f"{cluster.url}/tokenize"
    counted = httpx.post(tokenize, json={"model": MODEL, "prompt": "The cat"}, timeout=10).json()
    ids = client.completions.create(**asked | {"prompt": counted["tokens"]})
    assert ids.choices[0].text == words.choices[0].text
    assert words.usage.prompt_tokens == counted["count"]
    pieces = [c.text for chunk in client.completions.create(**asked, stream=True) for c in chunk.choices]
    assert "".join(pieces) == words.choices[0].text


def test_models(client):
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


async def test_many_at_once(cluster, asked):
    body = asked.body()
    question = {"model": MODEL, "messages": body["messages"], "max_tokens": body["max_tokens"], **GREEDY}
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", timeout=60) as client:
        answers = await asyncio.gather(*(client.chat.completions.create(**question) for _ in range(8)))
        assert {answer.choices[0].message.content.strip() for answer in answers} == {asked.text}
        stream = await client.chat.completions.create(**question, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text.strip() == asked.text


def test_the_description_is_served(cluster):
    document = httpx.get(f"{cluster.url}/openapi.json", timeout=10).json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"} <= document["paths"].keys()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(cluster, asked):
    body = json.dumps(asked.body(stream=True))
    command = ["curl", "-sS", "-N", f"{cluster.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", "@-"], input=body, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("data: [DONE]\n\n")


def test_langchain(cluster, asked):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model=MODEL,
        base_url=f"{cluster.url}/v1",
        api_key="unused",
        temperature=0,
        max_tokens=asked.num_tokens,
        extra_body={"repetition_penalty": 1.0},
    )
    messages = asked.body()["messages"]
    assert model.invoke(messages).content.strip() == asked.text
    assert "".join(chunk.content for chunk in model.stream(messages)).strip() == asked.text


def test_litellm(cluster, asked):
    litellm = pytest.importorskip("litellm")
    answer = litellm.completion(
        model=f"openai/{MODEL}",
        messages=asked.body()["messages"],
        max_tokens=asked.num_tokens,
        api_base=f"{cluster.url}/v1",
        api_key="unused",
        **GREEDY,
    )
    assert answer.choices[0].message.content.strip() == asked.text
