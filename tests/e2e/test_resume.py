"""Replicas killed with SIGKILL while they work: streams go on elsewhere, pictures are encoded elsewhere.

Each seed of `OMNILMM_RESUME_SEEDS` is a decoder killed at a random point of an answer, in one of four ways to draw it.
A killed replica is back after some ten seconds, so an ordinary run takes four of them; fifty take ten minutes.
"""

import json
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from e2e_cluster import application, data_uri, model_settings, wait_until
from PIL import Image

pytestmark = pytest.mark.e2e

APP = "resume"
MODEL = "omnilmm-3b"
NUM_SEEDS = int(os.environ.get("OMNILMM_RESUME_SEEDS", "4"))
NUM_TOKENS = 500
STYLES = {
    "greedy": {"temperature": 0, "repetition_penalty": 1.0},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "seed": 11, "repetition_penalty": 1.2},
}
LIST = {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1000}
SCHEMA = {"type": "object", "properties": {"seen": LIST}, "required": ["seen"], "additionalProperties": False}
STRUCTURED = {"response_format": {"type": "json_schema", "json_schema": {"name": "list", "schema": SCHEMA}}}


@pytest.fixture(scope="module")
def prefix(cluster, data):
    """An application with two vision replicas, and three decoders: one may be on its way back."""
    model = model_settings(data, MODEL)
    for pool, size in (("vision", 2), ("decoder", 3)):
        model.setdefault(pool, {})["autoscaling"] = {"min_replicas": size, "max_replicas": size}
    with application(APP, {"models": [model]}) as running:
        yield running


def body(folder, colour, **changes):
    path = folder / f"{'-'.join(map(str, colour))}.png"
    Image.new("RGB", (23, 29), colour).save(path)
    content = [{"type": "image_url", "image_url": {"url": data_uri(path)}}, {"type": "text", "text": "What is this?"}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "ignore_eos": True} | changes


def stream(cluster, prefix, asked, on_piece=lambda number: None):
    """The streamed text, and the tokens the usage counts."""
    asked = asked | {"stream": True, "stream_options": {"include_usage": True}}
    pieces, counted, ending = [], None, None
    url = f"{cluster.url}{prefix}/v1/chat/completions"
    with httpx.stream("POST", url, json=asked, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                ending = line
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            on_piece(len(pieces))
    assert ending == "data: [DONE]"
    return "".join(pieces), counted


def replicas(pool):
    """What the live replicas of a pool say of themselves, by process id."""
    from ray import serve

    handle = serve.get_deployment_handle(f"{pool}-{MODEL}", app_name=APP)
    told = {}
    for response in [handle.stats.remote() for _ in range(12)]:
        try:
            stats = response.result(timeout_s=60)
        except Exception:
            continue  # asked one that was just killed
        told[stats["pid"]] = stats
    return told


def kill_busy_decoder():
    for _ in range(50):
        busy = [pid for pid, stats in replicas("decoder").items() if stats["num_running"]]
        if busy:
            os.kill(busy[0], signal.SIGKILL)
            return
    raise AssertionError("no decoder is at work")


def wait_for_two(pool):
    wait_until(lambda: len(replicas(pool)) >= 2, f"two {pool} replicas serve", 90)


@pytest.mark.parametrize("style", STYLES)
def test_a_stream_outlives_two_decoders(cluster, prefix, tmp_path, style):
    asked = body(tmp_path, (3, 3, 3), max_tokens=500, **STYLES[style])
    whole = stream(cluster, prefix, asked)
    wait_for_two("decoder")
    deaths = [5, 25]

    def kill_when_due(number):
        if deaths and number >= deaths[0]:
            del deaths[0]
            kill_busy_decoder()

    assert stream(cluster, prefix, asked, kill_when_due) == whole
    assert not deaths, "both were killed in the middle"
    assert whole[1] == 500, "each token counts once"
    wait_for_two("decoder")


def style_of(seed):
    """Greedy and drawn by the seed, free and in a form, in turn."""
    style = STYLES["sampled"] | {"seed": seed} if seed % 2 else STYLES["greedy"]
    return style | (STRUCTURED if seed // 2 % 2 else {"ignore_eos": True})


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_an_answer_killed_at_a_random_point_is_the_undisturbed_one(cluster, prefix, tmp_path, seed):
    wait_for_two("decoder")
    asked = body(tmp_path, (seed, 5, 5), max_tokens=NUM_TOKENS, ignore_eos=False) | style_of(seed)
    pieces = []
    text, counted = stream(cluster, prefix, asked, pieces.append)
    assert counted == NUM_TOKENS
    assert "response_format" not in asked or text.startswith("{")
    due = random.Random(seed).randint(1, len(pieces) // 2)  # later, the answer may be complete before the signal is
    killed = []

    def kill_when_due(number):
        if number >= due and not killed:
            killed.append(number)
            kill_busy_decoder()

    assert stream(cluster, prefix, asked, kill_when_due) == (text, counted), f"killed after {due} of {len(pieces)}"
    assert killed


def test_all_streams_of_a_decoder_outlive_it(cluster, prefix, tmp_path):
    """Twelve at once, more than the retry budget of a router that has just started would pay for."""
    style = STYLES["sampled"]
    requests = [body(tmp_path, (i, 4, 4), max_tokens=200, **(style | {"seed": i})) for i in range(12)]
    with ThreadPoolExecutor(len(requests)) as pool:
        alone = list(pool.map(lambda asked: stream(cluster, prefix, asked), requests))
        wait_for_two("decoder")
        killed = []

        def kill_once(number):
            if number >= 4 and not killed:
                killed.append(True)
                kill_busy_decoder()

        first = pool.submit(stream, cluster, prefix, requests[0], kill_once)
        others = [pool.submit(stream, cluster, prefix, asked) for asked in requests[1:]]
        resumed = [future.result() for future in (first, *others)]
    assert killed
    assert [counted for _, counted in resumed] == [200] * 12
    same = sum(text == whole for (text, _), (whole, _) in zip(resumed, alone, strict=True))
    assert same >= 11, "in company matrix products round differently; once in a while a draw falls the other way"
    wait_for_two("decoder")


def test_a_vision_replica_that_dies_at_work_costs_no_request(cluster, prefix, tmp_path):
    wait_for_two("vision")
    victim = next(iter(replicas("vision")))
    bodies = [body(tmp_path, (i, 77, 99), max_tokens=2, **STYLES["greedy"]) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(cluster.post, asked, prefix) for asked in bodies]
        answers[10].result()
        os.kill(victim, signal.SIGKILL)
        responses = [answer.result() for answer in answers]
    assert [response.status_code for response in responses] == [200] * 40
    assert all(r.json()["usage"]["images"][0]["source"] == "encoded" for r in responses)
    wait_for_two("vision")
    assert victim not in replicas("vision")
