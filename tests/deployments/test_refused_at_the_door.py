"""A tenant whose line is full is refused before anything is done for its request; nobody else is."""

from __future__ import annotations

from contextlib import ExitStack

import httpx
import pytest
from http_fakes import Decoder, client_of, error_of, make_card, make_flow, make_service

from deployments.asking import answer_document
from deployments.http import make_app
from deployments.repeating import MARK, RepeatedRefusals
from omnilmm.api.endpoints import ENDPOINTS
from omnilmm.errors import QueueFull
from omnilmm.messages import Priority
from omnilmm.observe import RequestFinished
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Tenant, new_key
from omnilmm.tenancy.lines import Lines
from omnilmm.tenancy.places import Places

CHAT = "/v1/chat/completions"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
NO_PICTURE = HELLO | {"messages": [{"role": "user", "content": [PICTURE]}]}
BODIES = {
    CHAT: HELLO,
    "/v1/completions": {"model": "m", "prompt": "Hello"},
    "/v1/responses": {"model": "m", "input": "Hello"},
}
KEYS = {name: new_key() for name in ("acme", "other")}


class Heard:
    def __init__(self) -> None:
        self.events: list[object] = []

    def emit(self, event: object) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def card(data):
    return make_card(data, "m")


@pytest.fixture
def decoder():
    return Decoder()


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def service(card, decoder, heard):
    keys = KeyBook([KeyRecord(digest, Tenant(name, name), id=name) for name, (_, digest) in KEYS.items()])
    lines = Lines(heard, clock=lambda: 100.0)  # what is remembered stays so
    lines.resize({"m": 6, "n": 6})
    flows = {name: make_flow(card, decoder) for name in ("m", "n")}
    return make_service(flows, keys=keys, lines=lines)


@pytest.fixture
async def http(service):
    async with client_of(service) as client:
        yield client


@pytest.fixture
def crowd(service):
    """Four answers of acme to m are under way: as many as it may have."""
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(service.lines.enter("acme", "m", Priority.ONLINE))
        yield held


def as_tenant(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name][0]}"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_nothing_is_done_for_who_is_refused(http, service, decoder, heard, crowd, path, stream):
    refused = await http.post(path, json=BODIES[path] | {"stream": stream}, headers=as_tenant("acme"))
    assert error_of(refused) == (503, "overloaded", None)
    assert refused.headers["Retry-After"] == "1"
    assert refused.headers[MARK] == '{"model": "m", "seconds": 0.02}'
    assert decoder.calls == []
    assert service.ledger.receipts == [], "it was not let in"
    (event,) = heard.events
    assert isinstance(event, RequestFinished)
    assert (event.model, event.status) == ("m", 503)


async def test_its_pictures_are_not_looked_at(http, crowd):
    assert (await http.post(CHAT, json=NO_PICTURE, headers=as_tenant("acme"))).status_code == 503
    assert (await http.post(CHAT, json=NO_PICTURE, headers=as_tenant("other"))).status_code == 400


async def test_others_and_other_models_are_answered(http, crowd):
    assert (await http.post(CHAT, json=HELLO, headers=as_tenant("other"))).status_code == 200
    assert (await http.post(CHAT, json=HELLO | {"model": "n"}, headers=as_tenant("acme"))).status_code == 200


async def test_room_again_is_room_at_once(http, service, crowd):
    assert (await http.post(CHAT, json=HELLO, headers=as_tenant("acme"))).status_code == 503
    crowd.close()
    assert (await http.post(CHAT, json=HELLO, headers=as_tenant("acme"))).status_code == 200
    service.lines.check_integrity()


async def test_what_the_decoder_says_is_remembered_and_marked(http, service, decoder):
    decoder.failures[0] = (0, QueueFull("The decode queue is full.", retry_after=1.0))
    first = await http.post(CHAT, json=HELLO, headers=as_tenant("acme"))
    assert first.headers[MARK] == '{"model": "m", "seconds": 0.005}'
    assert [receipt.status for receipt in service.ledger.receipts] == [503], "this one was let in"
    again = await http.post(CHAT, json=HELLO, headers=as_tenant("acme"))
    assert (first.status_code, again.status_code, len(decoder.calls)) == (503, 503, 1)
    assert (await http.post(CHAT, json=HELLO, headers=as_tenant("other"))).status_code == 200


async def test_a_router_without_places_is_counted_too(http, service, heard):
    service.places = Places(1)
    with service.places.take("acme"):
        refused = await http.post(CHAT, json=HELLO, headers=as_tenant("acme"))
    assert refused.headers[MARK] == '{"model": "m", "seconds": 0.005}'
    assert len(heard.events) == 1


async def test_a_server_that_stops_is_not_a_full_one(http, service):
    await service.places.drain(0.0)
    stopping = await http.post(CHAT, json=HELLO, headers=as_tenant("acme"))
    assert stopping.status_code == 503
    assert MARK not in stopping.headers


async def test_lines_of_a_batch_are_not_refused_here(service, crowd):
    tenant = Tenant("acme", "acme")
    for _ in range(4):
        crowd.enter_context(service.lines.enter("acme", "m", Priority.BATCH))
    answer = await answer_document(service, CHAT, HELLO, tenant=tenant, request_id="r", batch_id="b")
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_proxy_and_router_together(service, heard, crowd):
    """What a client sees behind a proxy: the first refusal is the router's, the others are not heard there."""
    repeated: list[str] = []
    now = [0.0]
    proxy = RepeatedRefusals(make_app(service), note_repeated=repeated.append, clock=lambda: now[0])
    transport = httpx.ASGITransport(proxy, client=("127.0.0.1", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=as_tenant("acme")) as client:
        answers = [await client.post(CHAT, json=HELLO) for _ in range(3)]
        assert {(answer.content, answer.headers["Retry-After"]) for answer in answers} == {(answers[0].content, "1")}
        assert [error_of(answer)[0] for answer in answers] == [503] * 3
        assert (len(heard.events), repeated) == (1, ["m", "m"])
        assert (await client.post(CHAT, json=HELLO, headers=as_tenant("other"))).status_code == 200
        crowd.close()
        now[0] += 0.03
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
