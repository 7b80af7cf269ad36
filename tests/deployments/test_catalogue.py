"""The catalogue of bad requests at the routes, over a real pipeline: every case is answered as it must be, and the
known question asked after it gets the known answer."""

from __future__ import annotations

import json
import re

import pytest
import pytest_asyncio
from bad_pictures import PICTURES
from bad_requests import CANARY, CASES
from http_fakes import client_of, error_of, make_service

from omnilmm.config import ImageLimits
from omnilmm.image.reader import ImageReader
from omnilmm.pipeline import Pipeline

pytestmark = pytest.mark.asyncio(loop_scope="module")

LEAKS = re.compile(rb"0x[0-9a-f]{6,}|/usr/|/home/|Traceback|PIL|pydantic|site-packages")
CHAT = "/v1/chat/completions"
GOOD = {
    "model": "omnilmm-3b",
    "messages": [{"role": "user", "content": "How many?"}],
    "max_tokens": 3,
    "temperature": 0,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(data):
    async with Pipeline.load(str(data / "minicpm-v-tiny"), name="omnilmm-3b", dtype="float32") as pipeline:
        limits = ImageLimits()
        service = make_service({"omnilmm-3b": pipeline.flow}, images=ImageReader(limits), limits=limits)
        service.max_body_bytes = 32 << 20
        async with client_of(service) as client:
            yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def known(http):
    return (await http.post(CHAT, json=GOOD)).json()["choices"]


async def send(http, document):
    body = json.dumps(document, separators=(",", ":"))
    response = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert not LEAKS.search(response.content)
    return response


@pytest.mark.parametrize(
    ("changes", "code", "param"), [pytest.param(*case, id=f"{row}-{i}") for i, (row, *case) in enumerate(CASES)]
)
async def test_bad_bodies(http, known, changes, code, param):
    response = await send(http, {k: v for k, v in {**GOOD, **changes}.items() if v is not ...})
    assert error_of(response) == (400, code, param)
    assert CANARY not in response.text
    assert (await http.post(CHAT, json=GOOD)).json()["choices"] == known


@pytest.mark.parametrize(("url", "wanted"), [pytest.param(*case, id=row) for row, *case in PICTURES])
async def test_pictures(http, known, url, wanted):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    response = await send(http, GOOD | {"messages": [{"role": "user", "content": content}]})
    if wanted[0] == 200:
        assert response.status_code == 200, response.text
    else:
        assert error_of(response) == (*wanted, "messages[0].content[0].image_url.url")
    assert (await http.post(CHAT, json=GOOD)).json()["choices"] == known


@pytest.mark.parametrize(
    ("content", "headers", "wanted"),
    [
        (b"", {}, (400, "invalid_json")),
        (b"null", {}, (400, "invalid_json")),
        (b"[]", {}, (400, "invalid_json")),
        (b"\xef\xbb\xbf{}", {}, (400, "invalid_json")),
        ('{"model": "m"}'.encode("utf-16"), {}, (400, "invalid_json")),
        (b'{"model": "\xff"}', {}, (400, "invalid_json")),
        (b'{"model": "a", "model": "b"}', {}, (400, "invalid_json")),
        (b"{} x", {}, (400, "invalid_json")),
        (b"[" * 33 + b"]" * 33, {}, (400, "invalid_json")),
        (b"[" * 100_000, {}, (400, "invalid_json")),
        (b'{"a":' * 100_000, {}, (400, "invalid_json")),
        (json.dumps(GOOD).encode(), {"content-type": "text/plain"}, (415, "unsupported_media_type")),
        (json.dumps(GOOD).encode(), {"content-type": ""}, (415, "unsupported_media_type")),
        (json.dumps(GOOD).encode(), {"content-encoding": "gzip"}, (415, "unsupported_media_type")),
        (json.dumps(GOOD).encode(), {"content-length": str(10**13)}, (413, "request_too_large")),
        (json.dumps(GOOD).encode(), {"x-request-id": "a\tb"}, (400, "invalid_value")),
    ],
)
async def test_bodies_that_are_no_json(http, known, content, headers, wanted):  # P10, P11, H01
    response = await http.post(CHAT, content=content, headers={"content-type": "application/json"} | headers)
    assert error_of(response)[:2] == wanted
    assert (await http.post(CHAT, json=GOOD)).json()["choices"] == known
