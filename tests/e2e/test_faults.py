"""What may break without anyone noticing: the cache, a client, a decoder."""

import json
import os
import signal
from contextlib import contextmanager

import httpx
import pytest
import redis
from e2e_cluster import application, data_uri, model_settings, wait_until
from PIL import Image

from deployments.redis_server import RedisServer

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server():
    with RedisServer() as running:
        yield running


@pytest.fixture(scope="module")
def faulty(cluster, data, server):
    """An application whose Redis we hold in our hands, and whose decoder can be lost."""
    model = model_settings(data, "omnilmm-3b")
    model["decoder"]["autoscaling"] = {"min_replicas": 2, "max_replicas": 2}
    with application("faults", {"models": [model], "cache": {"redis": server.url}}) as prefix:
        yield prefix


def picture_body(folder, colour, **changes):
    path = folder / "picture.png"
    Image.new("RGB", (23, 29), colour).save(path)
    content = [{"type": "image_url", "image_url": {"url": data_uri(path)}}, {"type": "text", "text": "What is this?"}]
    body = {"model": "omnilmm-3b", "messages": [{"role": "user", "content": content}], "max_tokens": 6}
    return body | {"temperature": 0, "repetition_penalty": 1.0} | changes


def answer(cluster, prefix, body):
    response = cluster.post(body, prefix)
    assert response.status_code == 200, response.text
    document = response.json()
    return document["choices"][0]["message"]["content"], document["usage"]["images"][0]["source"]


@contextmanager
def killed(server):
    os.kill(server.pid, signal.SIGKILL)
    try:
        yield
    finally:
        server.start()


@contextmanager
def hung(server):
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextmanager
def full(server):
    with redis.Redis.from_url(server.url) as client:
        before = client.config_get("maxmemory*")
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        try:
            yield
        finally:
            for name in ("maxmemory", "maxmemory-policy"):
                client.config_set(name, before[name])


@contextmanager
def locked(server):
    """The password is changed, and everyone must sign in again."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", "changed")
        client.client_kill_filter(_type="normal", skipme=True)
        try:
            yield
        finally:
            client.config_set("requirepass", "")


FAULTS = {"killed": killed, "hung": hung, "full": full, "locked": locked}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_answers_whatever_redis_does(cluster, faulty, server, tmp_path, fault):
    number = list(FAULTS).index(fault)
    known = picture_body(tmp_path, (number, 1, 1))
    known_answer, _ = answer(cluster, faulty, known)
    with FAULTS[fault](server):
        again, _ = answer(cluster, faulty, known)
        assert again == known_answer
        fresh = picture_body(tmp_path, (number, 2, 2))
        first, source = answer(cluster, faulty, fresh)
        assert source == "encoded"
        assert answer(cluster, faulty, fresh)[0] == first
    wait_until(lambda: answer(cluster, faulty, known)[0] == known_answer, "all is well again")


def test_a_client_that_leaves_frees_its_sequence(cluster, golden):
    body = golden("omnilmm-3b", "coins_gray.png", "empty").body(stream=True, max_tokens=3000, ignore_eos=True)
    with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        received = response.iter_bytes()  # closing this iterator closes the connection
        next(received)
        running = cluster.stats("decoder-omnilmm-3b")
    assert running["num_running"] == 1
    wait_until(lambda: cluster.stats("decoder-omnilmm-3b")["num_running"] == 0, "the sequence is gone", 5)
    left = cluster.stats("decoder-omnilmm-3b")
    assert left["blocks_used"] == 0
    assert left["generated_tokens"] - running["generated_tokens"] < 2000, "it was not simply finished"


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "seed": 5}])
def test_a_decoder_killed_mid_stream_leaves_no_seam(cluster, faulty, tmp_path, changes):
    body = picture_body(tmp_path, (3, 3, 3), max_tokens=400, ignore_eos=True, **changes)
    whole, _ = answer(cluster, faulty, body)
    pids = decoder_pids(cluster)
    pieces, killed_one = [], False
    with httpx.stream(
        "POST", f"{cluster.url}{faulty}/v1/chat/completions", json={**body, "stream": True}, timeout=90
    ) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event
            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
            if not killed_one and len(pieces) > 3:
                os.kill(busy_pid(cluster, pids), signal.SIGKILL)
                killed_one = True
    assert killed_one
    assert "".join(pieces) == whole
    wait_until(lambda: len(decoder_pids(cluster)) == 2 and decoder_pids(cluster) != pids, "both replicas are back")


def decoder_pids(cluster):
    """Process ids of the decoder replicas, found by asking until every one has answered."""
    answers = [cluster.stats("decoder-omnilmm-3b", "faults") for _ in range(24)]
    return {a["pid"] for a in answers}


def busy_pid(cluster, pids):
    for _ in range(200):
        stats = cluster.stats("decoder-omnilmm-3b", "faults")
        if stats["num_running"]:
            return stats["pid"]
    raise AssertionError(f"none of {pids} is at work")
