"""The rest of what a user meets: errors, ids, keys, metrics, logs."""

import json
import re
import time
from pathlib import Path

import httpx
import pytest
from e2e_cluster import application, model_settings, wait_until

from omnilmm.tenancy.keys import new_key

pytestmark = pytest.mark.e2e


def error_of(response):
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_bad_requests_are_refused_and_harm_nobody(cluster, golden):
    wanted = golden("omnilmm-3b", "coins_gray.png", "empty")
    cases = [
        ({"model": "nothing"}, (404, "model_not_found", "model")),
        ({"temperature": 3}, (400, "decimal_above_max_value", "temperature")),
        ({"max_tokens": 100_000}, (400, "context_length_exceeded", "messages")),
        ({"tools": []}, (400, "unknown_parameter", "tools")),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, (400, "context_length_exceeded", "messages")),
    ]
    for changes, error in cases:
        response = cluster.post(wanted.body(**changes))
        assert error_of(response)[:2] == error[:2]
        assert response.headers["x-request-id"]
        assert cluster.post(wanted.body()).json()["choices"][0]["message"]["content"].strip() == wanted.text


def test_a_body_of_many_megabytes_passes_and_one_too_large_does_not(cluster, golden):
    wanted = golden("omnilmm-3b", "coins_gray.png", "empty")
    text = json.dumps(wanted.body())
    headers = {"content-type": "application/json"}
    url = f"{cluster.url}/v1/chat/completions"
    padded = text + " " * (12 * 1024**2)
    assert httpx.post(url, content=padded, headers=headers, timeout=60).status_code == 200
    too_large = httpx.post(url, content=" " * (33 * 1024**2), headers=headers, timeout=60)
    assert error_of(too_large)[:2] == (413, "request_too_large")


def test_a_request_id_goes_round(cluster, golden):
    body = golden("omnilmm-3b", "coins_gray.png", "empty").body()
    response = cluster.post(body, headers={"x-request-id": "round-trip-1"})
    assert response.headers["x-request-id"] == "round-trip-1"
    assert response.json()["id"] == "chatcmpl-round-trip-1"

    logs = Path(re.search(r"logs: (\S+)", cluster.await_line("Ray is up at", 5)).group(1))

    def lines():
        texts = [path.read_text(encoding="utf-8") for path in logs.glob("*router*.log")]
        return [json.loads(line) for text in texts for line in text.splitlines() if "round-trip-1" in line]

    wait_until(lambda: any(line.get("message") == "answered" for line in lines()), "the log has the request")
    line = next(line for line in lines() if line.get("message") == "answered")
    assert line["request_id"] == "round-trip-1"
    assert line["model"] == "omnilmm-3b"
    assert line["completion_tokens"] == 24


def test_metrics_tell_of_requests_pictures_and_blocks(cluster, golden):
    import ray

    body = golden("omnilmm-3b", "coins_gray.png", "empty").body()
    assert [cluster.post(body).status_code for _ in range(2)] == [200, 200]
    port = next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
    wanted = (
        r'ray_omnilmm_requests(_total)?\{.*status="200"',
        "ray_omnilmm_time_to_first_token_seconds_count",
        "ray_omnilmm_time_per_output_token_seconds_count",
        "ray_omnilmm_queue_seconds_count",
        r'ray_omnilmm_images(_total)?\{.*source="kv"',
        "ray_omnilmm_encodes",
        r'ray_omnilmm_cache_lookups(_total)?\{.*tier="redis"',
        "ray_omnilmm_step_sequences_count",
        "ray_omnilmm_encode_batch_size_count",
        "ray_omnilmm_kv_blocks_used",
    )

    def missing():
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        return [series for series in wanted if not re.search(series, page)]

    wait_until(lambda: not missing(), "all series are there", 150)


def test_with_keys_nothing_answers_without_one(cluster, data):
    key, digest = new_key()
    model = model_settings(data, "omnilmm-3b")
    keys = [{"tenant": "acme", "sha256": digest, "models": ["omnilmm-3b"]}]
    with application("keyed", {"models": [model], "keys": keys, "cache": {"redis": "none"}}) as prefix:
        body = {"model": "omnilmm-3b", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        wrong = {"Authorization": "Bearer sk-omni-" + "x" * 43}
        for headers in ({}, wrong):
            refused = cluster.post(body, prefix, headers=headers)
            assert error_of(refused)[:2] == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        assert cluster.post(body, prefix, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(f"{cluster.url}{prefix}/health", timeout=10).status_code == 200


def test_the_server_is_ready_and_healthy(cluster):
    for path in ("health", "ready"):
        assert httpx.get(f"{cluster.url}/{path}", timeout=10).status_code == 200
    begun = time.monotonic()
    assert httpx.get(f"{cluster.url}/v1/nothing", timeout=10).status_code == 404
    assert time.monotonic() - begun < 10
