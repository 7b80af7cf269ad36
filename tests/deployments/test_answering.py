"""The answering routes over a flow that says what it is told: choices, streams, failures, limits and receipts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from http_fakes import ANSWER, Decoder, Service, client_of, error_of, make_card, make_flow, make_service

from deployments.asking import LoggedReceipts, answer_document, ask, caller_of
from omnilmm.api.endpoints import ENDPOINTS
from omnilmm.api.sse import DONE_DATA, EventReader
from omnilmm.errors import InvalidRequest, NotFound, Overloaded, ReplicaLost
from omnilmm.messages import GrammarKind, Priority
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Tenant, new_key
from omnilmm.tenancy.tenant import TenantLimits

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
PROMPT = {"model": "m", "prompt": "Hello"}
INPUT = {"model": "m", "input": "Hello"}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": PROMPT, "/v1/responses": INPUT}
KEY, DIGEST = new_key()
MINE = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def card(data):
    return make_card(data, "m")


@pytest.fixture
def decoder():
    return Decoder()


@pytest.fixture
def service(card, decoder):
    return make_service({"m": make_flow(card, decoder)})


@pytest.fixture
async def http(service):
    async with client_of(service) as client:
        yield client


def limited(service: Service, **limits: int) -> Tenant:
    tenant = Tenant("acme", "acme", limits=TenantLimits(**limits), key_id="key-1")
    service.keys = KeyBook([KeyRecord(DIGEST, tenant, id="key-1")])
    return tenant


def events(text: bytes) -> list[Any]:
    return [json.loads(event.data) for event in EventReader().feed(text) if event.data != DONE_DATA]


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


# -- choices ------------------------------------------------------------------------------------------


async def test_choices_have_seeds_and_ids_of_their_own_and_one_prompt(http, decoder):
    answer = (await http.post("/v1/chat/completions", json=CHAT | {"n": 4, "seed": 5, "max_tokens": 3})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({call.sampling.seed for call in decoder.calls}) == 4
    assert len({call.request_id for call in decoder.calls}) == 4
    assert decoder.calls[0].sampling.seed == 5
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens"] == len(decoder.calls[0].prompt.ids)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # as the first met it


async def test_choices_of_a_stream_come_with_their_index(http, decoder):
    body = CHAT | {"n": 3, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await http.post("/v1/chat/completions", json=body)).content)
    whole = (await http.post("/v1/chat/completions", json=CHAT | {"n": 3, "max_tokens": 3})).json()
    for choice in whole["choices"]:
        assert text_of(chunks, choice["index"]) == choice["message"]["content"]
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in ends) == [0, 1, 2]
    firsts = [choice["index"] for chunk in chunks[:3] for choice in chunk["choices"] if "role" in choice["delta"]]
    assert firsts == [0, 1, 2]
    assert chunks[-1]["usage"]["completion_tokens"] == 9


async def test_if_one_choice_fails_all_do(http, decoder, service):
    decoder.failures[2] = (1, Overloaded("Busy.", retry_after=2))
    response = await http.post("/v1/chat/completions", json=CHAT | {"n": 3})
    assert error_of(response)[0] == 503
    assert response.headers["retry-after"] == "2"
    assert decoder.num_open == 0
    assert [receipt.status for receipt in service.ledger.receipts] == [503]


async def test_prompts_times_choices(http, decoder):
    body = {"model": "m", "prompt": ["Hello", "Good day"], "n": 2, "max_tokens": 2, "logprobs": 1}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    lengths = {len(call.prompt.ids) for call in decoder.calls}
    assert answer["usage"]["prompt_tokens"] == sum(lengths) > max(lengths)
    assert answer["usage"]["completion_tokens"] == 8
    assert all(len(choice["logprobs"]["tokens"]) == 2 for choice in answer["choices"])
    assert len({call.request_id for call in decoder.calls}) == 4


async def test_a_form_reaches_the_decoder(http, decoder):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    decoder.failures[0] = (0, InvalidRequest("stop here"))  # what follows is not JSON: the call is enough
    await http.post("/v1/chat/completions", json=CHAT | {"response_format": form})
    assert decoder.calls[0].sampling.grammar.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(decoder.calls[0].sampling.grammar.source) == schema


# -- streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_failure_before_the_first_word_has_a_status(http, decoder, path):
    decoder.failures[0] = (0, Overloaded("Busy.", retry_after=1))
    response = await http.post(path, json=BODIES[path] | {"stream": True})
    assert error_of(response) == (503, "overloaded", None)


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_failure_in_the_middle_is_told_and_ends_the_stream(http, decoder, service, path):
    decoder.failures[0] = (2, RuntimeError("secret path /home/someone"))
    response = await http.post(path, json=BODIES[path] | {"stream": True})
    assert response.status_code == 200
    assert b"secret" not in response.content
    assert DONE_DATA.encode() not in response.content
    told = events(response.content)
    failed = [event for event in told if "error" in event or event.get("type") == "error"]
    assert failed
    assert told[-1] == failed[-1] or told[-1]["type"] == "response.failed"
    assert [receipt.status for receipt in service.ledger.receipts] == [500]
    assert decoder.num_open == 0


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_whole_and_streamed_answers_agree(http, path):
    whole = (await http.post(path, json=BODIES[path] | {"temperature": 0})).json()
    streamed = events((await http.post(path, json=BODIES[path] | {"temperature": 0, "stream": True})).content)
    match path:
        case "/v1/chat/completions":
            assert text_of(streamed) == whole["choices"][0]["message"]["content"]
        case "/v1/completions":
            text = "".join(choice["text"] for chunk in streamed for choice in chunk["choices"])
            assert text == whole["choices"][0]["text"]
        case "/v1/responses":
            assert streamed[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]
            assert streamed[-1]["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_frees_everything(service, decoder, n):
    tenant = limited(service, concurrent_requests=1)
    for number in range(n):
        decoder.gates[number] = asyncio.Event()  # never set
    body = ENDPOINTS["/v1/chat/completions"](CHAT | {"stream": True, "n": n})
    told = ask(service, body, tenant, caller_of(service, tenant, request_id="r"), endpoint="x")
    async with aclosing(told):
        for _ in range(2):
            await anext(told)
        assert decoder.num_open >= 1
    assert decoder.num_open == 0
    (receipt,) = service.ledger.receipts
    assert (receipt.status, receipt.request_id, receipt.key_id) == (499, "r", "key-1")
    service.governor.check_integrity()


# -- errors in the words of the route -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("/v1/completions", {"prompt": "word " * 500}, "prompt"),
        ("/v1/completions", {"prompt": [819, 820]}, "prompt"),
        ("/v1/completions", {"max_tokens": 500}, "prompt"),
        ("/v1/responses", {"input": "word " * 500}, "input"),
        ("/v1/responses", {"input": [{"role": "assistant", "content": "I"}]}, "input[0].role"),
        ("/v1/responses", {"input": [{"role": "assistant", "content": "I"}], "instructions": "b"}, "input[0].role"),
        (
            "/v1/responses",
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,QUJD"}]}
                ]
            },
            "input[0].content[0].image_url",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]},
            "messages[0].content[0].file.file_id",
        ),
    ],
)
async def test_the_field_is_named_as_the_client_wrote_it(http, path, changes, param):
    assert error_of(await http.post(path, json=BODIES[path] | changes))[::2] == (400, param)


# -- files --------------------------------------------------------------------------------------------


async def test_an_uploaded_picture_is_read_for_its_tenant(http, service, decoder, data):
    asked = []

    class Files:
        async def read(self, tenant: str, file_id: str) -> bytes:
            asked.append((tenant, file_id))
            if file_id == "file-gone":
                raise NotFound("There is no such file.", code="file_not_found")
            return (data / "images" / "coins_gray.png").read_bytes()

    service.images._files = Files()

    def chat(part: dict) -> dict:
        return {"model": "m", "messages": [{"role": "user", "content": [part]}]}

    by_id = chat({"type": "file", "file": {"file_id": "file-1"}})
    by_url = chat({"type": "image_url", "image_url": {"url": "file-1"}})
    item = {"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}
    for path, body in (
        ("/v1/chat/completions", by_id),
        ("/v1/chat/completions", by_url),
        ("/v1/responses", {"model": "m", "input": [item]}),
    ):
        assert (await http.post(path, json=body)).status_code == 200
    assert asked == [("default", "file-1")] * 3
    assert len({call.images[0].key for call in decoder.calls}) == 1
    gone = chat({"type": "file", "file": {"file_id": "file-gone"}})
    assert error_of(await http.post("/v1/chat/completions", json=gone)) == (
        404,
        "file_not_found",
        "messages[0].content[0].file.file_id",
    )


# -- limits and receipts ------------------------------------------------------------------------------


async def test_the_tenants_limits_hold_and_are_told(http, service):
    limited(service, requests_per_min=2)
    for remaining in ("1", "0"):
        answer = await http.post("/v1/chat/completions", json=CHAT, headers=MINE)
        assert answer.headers["x-ratelimit-remaining-requests"] == remaining
    refused = await http.post("/v1/chat/completions", json=CHAT, headers=MINE)
    assert error_of(refused)[:2] == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert len(service.ledger.receipts) == 2  # who was not let in has used nothing


async def test_garbage_counts_as_requests(http, service):
    limited(service, requests_per_min=2)
    statuses = [(await http.post("/v1/chat/completions", json={}, headers=MINE)).status_code for _ in range(3)]
    assert statuses == [400, 400, 429]
    service.governor.check_integrity()


async def test_a_stream_holds_its_place_until_it_ends(http, service, decoder):
    limited(service, concurrent_requests=1)
    decoder.gates[0] = asyncio.Event()
    first = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=MINE))
    await decoder.entered.wait()
    assert (await http.post("/v1/chat/completions", json=CHAT, headers=MINE)).status_code == 429
    decoder.gates[0].set()
    assert (await first).status_code == 200
    assert (await http.post("/v1/chat/completions", json=CHAT, headers=MINE)).status_code == 200


async def test_tokens_are_settled_by_what_was_used(http, service):
    limited(service, tokens_per_min=5000)
    answer = await http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 150}, headers=MINE)
    used = answer.json()["usage"]["total_tokens"]
    again = await http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 150}, headers=MINE)
    reserved = 5000 - int(answer.headers["x-ratelimit-remaining-tokens"])
    assert used < reserved
    assert 5000 - int(again.headers["x-ratelimit-remaining-tokens"]) < 2 * reserved


async def test_every_answer_has_a_receipt(http, service):
    limited(service)
    answer = (
        await http.post("/v1/chat/completions", json=CHAT | {"n": 2}, headers=MINE | {"x-request-id": "r1"})
    ).json()
    (receipt,) = service.ledger.receipts
    assert (receipt.tenant, receipt.key_id, receipt.model, receipt.status) == ("acme", "key-1", "m", 200)
    assert receipt.request_id == "r1"
    assert receipt.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert receipt.completion_tokens == answer["usage"]["completion_tokens"] == 2 * (len(ANSWER) + 1)


async def test_a_server_that_cannot_keep_its_records_takes_nothing(http, service, decoder):
    service.ledger.refuses = Overloaded("Records.", code="usage_backlog", retry_after=2)
    assert error_of(await http.post("/v1/chat/completions", json=CHAT))[:2] == (503, "usage_backlog")
    assert decoder.calls == []


async def test_an_unknown_model_leaves_no_receipt(http, service):
    assert error_of(await http.post("/v1/chat/completions", json=CHAT | {"model": "x" * 200}))[0] == 404
    assert service.ledger.receipts == []


async def test_a_request_has_one_time_for_all_its_answers(http, service, decoder):
    service.request_timeout_s = 0.0
    response = await http.post("/v1/chat/completions", json=CHAT | {"n": 2})
    assert error_of(response)[:2] == (504, "deadline_exceeded")
    assert decoder.calls == []


def test_receipts_without_a_database_are_lines_of_the_log(caplog, service):
    from omnilmm.tenancy.usage import Receipt

    ledger = LoggedReceipts()
    ledger.check_room()
    with caplog.at_level("INFO", "ray.serve"):
        ledger.record(Receipt(at=1.0, tenant="acme", key_id="k", model="m", status=200, request_id="r"))
    assert caplog.records[-1].ray_serve_extra_fields["tenant"] == "acme"


# -- lines of a batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_line_of_a_batch_is_answered_like_a_request(http, service, decoder, path):
    tenant = Tenant("acme", "acme", limits=TenantLimits(requests_per_min=1))
    lines = [
        await answer_document(service, path, BODIES[path] | {"temperature": 0}, tenant=tenant, request_id=f"r{i}")
        for i in range(3)  # not held by the limits per minute
    ]
    assert {call.priority for call in decoder.calls} == {Priority.BATCH}
    online = (await http.post(path, json=BODIES[path] | {"temperature": 0}, headers={"x-request-id": "r2"})).json()
    volatile = {"created", "created_at", "usage"}
    assert {k: v for k, v in lines[2].items() if k not in volatile} == {
        k: v for k, v in online.items() if k not in volatile
    }
    assert len(service.ledger.receipts) == 4


async def test_a_line_cannot_be_a_stream(service):
    with pytest.raises(InvalidRequest) as caught:
        await answer_document(
            service, "/v1/completions", PROMPT | {"stream": True}, tenant=Tenant("a", "a"), request_id="r"
        )
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "stream")


async def test_a_lost_replica_is_retried_behind_every_choice(http, decoder):
    decoder.failures[1] = (2, ReplicaLost("gone"))
    whole = (await http.post("/v1/chat/completions", json=CHAT | {"n": 2, "temperature": 0})).json()
    first, second = (choice["message"]["content"] for choice in whole["choices"])
    assert first == second
    assert len(decoder.calls) == 3
    assert decoder.calls[2].emitted == ANSWER[:2]


async def test_a_body_that_never_ends_is_not_waited_for_after_its_cap(http):
    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65536

    for path in ("/v1/completions", "/v1/responses", "/tokenize"):
        response = await http.post(path, content=pieces(), headers={"content-type": "application/json"})
        assert error_of(response)[:2] == (413, "request_too_large")
