"""The catalogue of bad requests against a running cluster: every case is answered as it must be, and the known question
asked after it gets the known answer."""

import json
import re

import httpx
import pytest
from bad_pictures import PICTURES
from bad_requests import CANARY, CASES

pytestmark = pytest.mark.e2e

LEAKS = re.compile(rb"0x[0-9a-f]{6,}|/usr/|/home/|Traceback|PIL|pydantic|site-packages")
GOOD = {
    "model": "omnilmm-3b",
    "messages": [{"role": "user", "content": "How many?"}],
    "max_tokens": 3,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def http(cluster):
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def known(http):
    return http.post("/v1/chat/completions", json=GOOD).json()["choices"]


def send(http, document):
    body = json.dumps(document, separators=(",", ":"))
    response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert not LEAKS.search(response.content)
    assert response.headers["x-request-id"]
    return response


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) <= 512
    return response.status_code, error["code"], error["param"]


def canary(http, known):
    assert http.post("/v1/chat/completions", json=GOOD).json()["choices"] == known


@pytest.mark.parametrize(
    ("changes", "code", "param"), [pytest.param(*case, id=f"{row}-{i}") for i, (row, *case) in enumerate(CASES)]
)
def test_bad_bodies(http, known, changes, code, param):
    response = send(http, {k: v for k, v in {**GOOD, **changes}.items() if v is not ...})
    assert error_of(response) == (400, code, param)
    assert CANARY not in response.text
    canary(http, known)


@pytest.mark.parametrize(("url", "wanted"), [pytest.param(*case, id=row) for row, *case in PICTURES])
def test_pictures(http, known, url, wanted):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    response = send(http, GOOD | {"messages": [{"role": "user", "content": content}]})
    if wanted[0] == 200:
        assert response.status_code == 200, response.text
    else:
        assert error_of(response) == (*wanted, "messages[0].content[0].image_url.url")
    canary(http, known)
