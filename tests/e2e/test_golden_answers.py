"""Over HTTP, through router, vision pool, Redis and decoder pool: what the original implementation answers."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from omnilmm.api.sse import DONE_DATA, EventReader
from omnilmm.chat import OmniLMMChat, img2base64

pytestmark = pytest.mark.e2e

OMNILMM = str(Path(sys.executable).with_name("omnilmm"))


def test_every_golden_answer_token_for_token(cluster, goldens):
    for golden in goldens:
        response = cluster.post(golden.body())
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        assert choice["message"]["content"].strip() == golden.text, golden
        assert response.json()["usage"]["completion_tokens"] == golden.num_tokens


def test_a_stream_says_the_same_and_ends_with_done(cluster, golden):
    wanted = golden("omnilmm-3b", "china.jpg", "en1")
    reader, pieces, last = EventReader(), [], None
    body = wanted.body(stream=True, stream_options={"include_usage": True})
    with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
        events = [event.data for received in response.iter_bytes() for event in reader.feed(received)]
    assert events[-1] == DONE_DATA
    for event in map(json.loads, events[:-1]):
        pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
        last = event
    assert "".join(pieces).strip() == wanted.text
    assert last["usage"]["prompt_tokens_details"]["image_tokens"] == 64


async def test_sixteen_at_once_answer_as_each_alone(cluster, goldens):
    client = openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused")
    chosen = (goldens * 2)[:16]

    async def ask(golden):
        body = golden.body()
        penalty = {"repetition_penalty": body.pop("repetition_penalty")}
        completion = await client.chat.completions.create(**body, extra_body=penalty)
        return completion.choices[0].message.content.strip()

    answers = await asyncio.gather(*map(ask, chosen))
    await client.close()
    assert answers == [golden.text for golden in chosen]


def test_the_official_client_lists_and_streams(cluster, golden):
    wanted = golden("omnilmm-12b", "china.jpg", "en1")
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused") as client:
        assert [model.id for model in client.models.list()] == ["omnilmm-3b", "omnilmm-12b"]
        body = wanted.body(stream=True, logprobs=True, top_logprobs=2)
        penalty = {"repetition_penalty": body.pop("repetition_penalty")}
        chunks = list(client.chat.completions.create(**body, extra_body=penalty))
    assert "".join(c.choices[0].delta.content or "" for c in chunks).strip() == wanted.text
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert len(tokens) == wanted.num_tokens
    assert all(t.logprob == pytest.approx(t.top_logprobs[0].logprob) for t in tokens), "greedy takes the best"


def test_a_seed_repeats_a_sampled_answer(cluster, golden):
    body = golden("omnilmm-3b", "coins_gray.png", "empty").body(temperature=1.0, seed=11)
    first, second = cluster.post(body).json(), cluster.post(body).json()
    other = cluster.post({**body, "seed": 12}).json()
    assert first["choices"] == second["choices"]
    assert first["choices"] != other["choices"]


def test_the_original_interface_over_a_cluster(cluster, golden):
    wanted = golden("omnilmm-12b", "cat_alpha.png", "turns3")
    inputs = {"image": img2base64(wanted.picture), "question": json.dumps(wanted.messages)}
    with OmniLMMChat(cluster.url, model="omnilmm-12b") as chat:
        assert chat.process(inputs, greedy=True, max_tokens=wanted.num_tokens) == wanted.text


def test_the_chat_command_streams_rounds_from_a_cluster(cluster, golden):
    wanted = golden("omnilmm-3b", "cat_alpha.png", "en1")
    question = wanted.messages[0]["content"]
    command = [OMNILMM, "chat", str(wanted.picture), question, "--url", cluster.url, "--model", "omnilmm-3b"]
    said = subprocess.run(
        [*command, "--greedy", "--max-tokens", str(wanted.num_tokens)],
        input="And now?\n\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    first, second = said.strip().split("\n")[:2]
    assert first.strip() == wanted.text
    assert second.strip()


def test_what_the_server_printed_works_when_pasted(cluster):
    line = cluster.await_line("curl -sN", 5)
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.strip().endswith("data: [DONE]")
    assert cluster.url in line
    answer = re.sub(r"^answer\s+", "", cluster.await_line("answer ", 5))
    assert answer
