"""The HTTP surface over a pipeline in this process: no Ray, no socket, the same routes."""

import base64
import json

import httpx
import openai
import pytest
import pytest_asyncio
from http_fakes import client_of, error_of, make_service

from deployments.http import make_app
from omnilmm.pipeline import Pipeline
from omnilmm.tenancy.keys import AdminKeys, KeyBook, KeyRecord, Tenant, new_key

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY, DIGEST = new_key()
ADMIN_KEY, ADMIN_DIGEST = new_key()
ACME = Tenant("acme", "acme", models=frozenset({"omnilmm-3b"}))
OPEN_ROUTES = {"/health", "/ready"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "PROPFIND", "NONSENSE")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(data):
    async with Pipeline.load(str(data / "minicpm-v-tiny"), name="omnilmm-3b", dtype="float32") as loaded:
        yield loaded


@pytest.fixture
def service(pipeline):
    return make_service({"omnilmm-3b": pipeline.flow, "omnilmm-hidden": pipeline.flow})


@pytest_asyncio.fixture(loop_scope="module")
async def http(service):
    async with client_of(service) as client:
        yield client


def picture_url(data, name="coins_gray.png"):
    return "data:image/png;base64," + base64.b64encode((data / "images" / name).read_bytes()).decode()


def body(data, words="How many?", **changes):
    picture = {"type": "image_url", "image_url": {"url": picture_url(data)}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": words}]}]
    return {"model": "omnilmm-3b", "messages": messages, "max_tokens": 5, "temperature": 0, **changes}


async def post(http, document, **headers):
    return await http.post("/v1/chat/completions", json=document, headers=headers)


async def test_whole_and_streamed_answers_agree(http, data):
    whole = (await post(http, body(data))).json()
    streamed = await post(http, body(data, stream=True, stream_options={"include_usage": True}))
    chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    text = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 5
    assert whole["usage"]["images"][0]["source"] in ("encoded", "cache", "kv")
    assert streamed.text.endswith("data: [DONE]\n\n")


async def test_the_official_client(service, data):
    transport = httpx.ASGITransport(make_app(service), client=("127.0.0.1", 5000))
    async with httpx.AsyncClient(transport=transport) as raw:
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="unused", http_client=raw)
        assert [model.id async for model in client.models.list()] == ["omnilmm-3b", "omnilmm-hidden"]
        completion = await client.chat.completions.create(**body(data, logprobs=True, top_logprobs=3))
        assert len(completion.choices[0].logprobs.content) == 5
        assert completion.choices[0].finish_reason == "length"
        stream = await client.chat.completions.create(**body(data, stream=True))
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == completion.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**body(data, model="nothing"))


async def test_health_and_readiness(http, service):
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/ready")).status_code == 200
    service.ready = False
    waiting = await http.get("/ready")
    assert waiting.status_code == 503
    assert waiting.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model": "nothing"}, (404, "model_not_found", "model")),
        ({"temperature": -1}, (400, "decimal_below_min_value", "temperature")),
        ({"surprise": 1}, (400, "unknown_parameter", "surprise")),
        ({"max_tokens": 5000}, (400, "context_length_exceeded", "messages")),
        ({"n": 17}, (400, "integer_above_max_value", "n")),
        ({"logit_bias": {"99999": 1}}, (400, "invalid_value", "logit_bias")),
        ({"stop_token_ids": [99999]}, (400, "invalid_value", "stop_token_ids")),
        ({"messages": [{"role": "assistant", "content": "I"}]}, (400, "invalid_value", "messages[0].role")),
    ],
)
async def test_bad_fields_are_named(http, data, changes, wanted):
    before = (await post(http, body(data))).json()["choices"]
    assert error_of(await post(http, body(data, **changes))) == wanted
    assert (await post(http, body(data))).json()["choices"] == before


@pytest.mark.parametrize(
    ("url", "code", "status"),
    [
        ("http://127.0.0.1/secret.png", "invalid_image_url", 400),
        ("file:///etc/passwd", "invalid_image_url", 400),
        ("data:image/png;base64,@@@@", "invalid_base64_image", 400),
        ("data:image/png;base64,", "empty_image_file", 400),
        ("data:image/png;base64,aGVsbG8gd29ybGQ=", "invalid_image_format", 400),
        ("data:text/html;base64,aGVsbG8gd29ybGQ=", "unsupported_image_media_type", 400),
    ],
)
async def test_bad_pictures_are_named(http, data, url, code, status):
    document = body(data)
    document["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
    assert error_of(await post(http, document)) == (status, code, "messages[0].content[0].image_url.url")


async def test_too_many_pictures(http, data):
    document = body(data)
    document["messages"][0]["content"] = [document["messages"][0]["content"][0]] * 4
    assert error_of(await post(http, document)) == (
        400,
        "array_above_max_length",
        "messages[0].content[3].image_url.url",
    )


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b'{"model": NaN}', b"\xff\xfe{}", b'{"a":1,"a":2}'])
async def test_what_is_not_json(http, content):
    response = await http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert error_of(response)[0] == 400


async def test_bodies_of_the_wrong_kind_or_size(http, data):
    good = json.dumps(body(data)).encode()
    plain = await http.post("/v1/chat/completions", content=good, headers={"content-type": "text/plain"})
    assert error_of(plain)[:2] == (415, "unsupported_media_type")
    huge = await http.post(
        "/v1/chat/completions", content=b"x" * (1 << 21), headers={"content-type": "application/json"}
    )
    assert error_of(huge)[:2] == (413, "request_too_large")

    async def pieces():
        for _ in range(32):
            yield b" " * 65536

    chunked = await http.post("/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"})
    assert error_of(chunked)[:2] == (413, "request_too_large")


@pytest.mark.parametrize(
    ("name", "value"), [("x-request-id", "a b"), ("x-session-id", "ü" * 3), ("x-session-id", "x" * 129)]
)
async def test_ids_from_clients_are_checked(http, data, name, value):
    response = await http.post("/v1/chat/completions", json=body(data), headers={name: value.encode()})
    assert error_of(response) == (400, "invalid_value", name)


async def test_a_request_id_names_the_answer(http, data):
    response = await post(http, body(data), **{"x-request-id": "mine-1"})
    assert response.json()["id"] == "chatcmpl-mine-1"


async def test_a_fault_of_ours_says_nothing_of_itself(service, data, monkeypatch):
    def fall(*args, **kwargs):
        raise RuntimeError("secret path /home/someone")

    monkeypatch.setattr(type(service.flows["omnilmm-3b"]), "answer", fall)
    transport = httpx.ASGITransport(make_app(service), client=("127.0.0.1", 5000), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/v1/chat/completions", json=body(data))
    assert response.status_code == 500
    assert "secret" not in response.text


def every_route(app):
    for route in app.routes:
        included = getattr(route, "original_router", None)  # FastAPI keeps an included router whole
        for inner in included.routes if included else [route]:
            path = getattr(inner, "path", None)
            for method in sorted(getattr(inner, "methods", None) or ()):
                if path is not None:
                    yield method, path.replace("{model}", "omnilmm-3b")


async def test_no_route_but_two_answers_without_a_key(service, data):
    service.keys = KeyBook([KeyRecord(DIGEST, ACME)])
    app = make_app(service)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 5000))
    strange = [(method, path) for method in METHODS for path in ("/v1/models", "/nothing", "/health", "//v1/models")]
    routes = {*every_route(app), *strange, ("GET", "/docs"), ("POST", "//v1/chat/completions")}
    assert routes >= {("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("POST", "/tokenize")}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for method, path in routes:
            response = await client.request(method, path)
            if path in OPEN_ROUTES and method == "GET":
                assert response.status_code == 200
                continue
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
        mine = {"Authorization": f"Bearer {KEY}"}
        assert [m["id"] for m in (await client.get("/v1/models", headers=mine)).json()["data"]] == ["omnilmm-3b"]
        assert (await client.post("/v1/chat/completions", json=body(data), headers=mine)).status_code == 200
        hidden = await client.post("/v1/chat/completions", json=body(data, model="omnilmm-hidden"), headers=mine)
        missing = await client.post("/v1/chat/completions", json=body(data, model="no-such"), headers=mine)
        assert hidden.status_code == 404
        assert hidden.content == missing.content


async def test_a_path_that_is_for_other_methods(http):
    for method, path in (
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/metrics"),
        ("PUT", "/health"),
    ):
        response = await http.request(method, path)
        assert error_of(response) == (405, "method_not_allowed", None)
        assert method not in response.headers["allow"]
    for path in ("//v1/models", "/v1/models/", "/v1/Models", "/v1/%2e%2e/admin", "/nothing", "/v1/chat", "/"):
        assert error_of(await http.get(path))[0] == 404  # H07


async def test_one_model(http, service):
    known = await http.get("/v1/models/omnilmm-3b")
    assert known.json() == {"id": "omnilmm-3b", "object": "model", "created": 1_700_000_000, "owned_by": "omnilmm"}
    assert error_of(await http.get("/v1/models/nothing")) == (404, "model_not_found", "model")
    service.keys = KeyBook([KeyRecord(DIGEST, ACME)])
    mine = {"Authorization": f"Bearer {KEY}"}
    hidden, missing = [await http.get(f"/v1/models/{name}", headers=mine) for name in ("omnilmm-hidden", "nothing")]
    assert hidden.content == missing.content


async def test_metrics_are_the_operators(http, service):
    assert "omnilmm_requests" in (await http.get("/metrics")).text
    service.keys = KeyBook([KeyRecord(DIGEST, ACME)])
    service.admins = AdminKeys([ADMIN_DIGEST])
    assert error_of(await http.get("/metrics"))[0] == 401
    assert error_of(await http.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}))[0] == 403  # K10
    page = await http.get("/metrics", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/plain")


async def test_words_and_ids_and_back(http, data):
    words = (
        await http.post("/tokenize", json={"model": "omnilmm-3b", "prompt": "How many?", "return_token_strs": True})
    ).json()
    assert words["count"] == len(words["tokens"]) == len(words["token_strs"])
    assert words["image_tokens"] == 0
    back = await http.post("/detokenize", json={"model": "omnilmm-3b", "tokens": words["tokens"]})
    assert back.json() == {"prompt": "How many?"}
    question = body(data)
    del question["max_tokens"], question["temperature"]
    counted = (await http.post("/tokenize", json=question)).json()
    answered = (await post(http, body(data))).json()
    assert counted["count"] == answered["usage"]["prompt_tokens"]
    assert counted["image_tokens"] == answered["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    assert error_of(await http.post("/detokenize", json={"model": "omnilmm-3b", "tokens": [999_999]})) == (
        *(400, "invalid_value", "tokens"),
    )
    assert error_of(await http.post("/tokenize", json={"model": "nothing", "prompt": "a"})) == (
        *(404, "model_not_found", "model"),
    )
    assert error_of(await http.post("/tokenize", json={"model": "omnilmm-3b", "prompt": "word " * 5000}))[1] == (
        "context_length_exceeded"
    )


async def test_a_prompt_goes_on_as_it_stands(http):
    asked = {"model": "omnilmm-3b", "prompt": "The cat", "max_tokens": 5, "temperature": 0}
    words = (await http.post("/v1/completions", json=asked)).json()
    ids = (await http.post("/tokenize", json={"model": "omnilmm-3b", "prompt": "The cat"})).json()["tokens"]
    again = (await http.post("/v1/completions", json=asked | {"prompt": ids})).json()
    assert words["choices"] == again["choices"]
    assert words["usage"]["prompt_tokens"] == len(ids)


async def test_a_response_says_what_a_completion_says(http, data):
    completion = (await post(http, body(data))).json()
    content = [{"type": "input_image", "image_url": picture_url(data)}, {"type": "input_text", "text": "How many?"}]
    asked = {"model": "omnilmm-3b", "input": [{"role": "user", "content": content}], "temperature": 0}
    response = (await http.post("/v1/responses", json=asked | {"max_output_tokens": 5})).json()
    assert response["output"][0]["content"][0]["text"] == completion["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == completion["usage"]["prompt_tokens"]
    assert response["status"] == "incomplete"


async def test_several_answers_are_each_reproducible(http, data):
    sampled = {"temperature": 1.5, "seed": 7, "top_k": 0, "top_p": 1}
    three = (await post(http, body(data, **sampled, n=3))).json()
    one = (await post(http, body(data, **sampled))).json()
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert texts[0] == one["choices"][0]["message"]["content"]
    assert len(set(texts)) > 1
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert three["usage"]["completion_tokens"] == 15
    assert len(three["usage"]["images"]) == 1
    assert (await post(http, body(data, **sampled, n=3))).json()["choices"] == three["choices"]


async def test_an_open_server_answers_its_own_machine_only(service):
    transport = httpx.ASGITransport(make_app(service), client=("203.0.113.7", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/health")).status_code == 200


async def test_the_openapi_document_describes_the_surface(http):
    document = (await http.get("/openapi.json")).json()
    assert set(document["paths"]) >= {
        *("/health", "/ready", "/metrics"),
        *("/v1/chat/completions", "/v1/completions", "/v1/responses"),
        *("/v1/models", "/v1/models/{model}", "/tokenize", "/detokenize"),
    }
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "repetition_penalty" in schema["properties"]
