"""Refusals at a walking pace: what a sender of garbage waits for, and that nobody else waits with it."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from http_fakes import Decoder, make_card, make_flow, make_service
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from deployments.http import make_app
from deployments.patience import BURST, MAX_HELD, MAX_SENDERS, MAX_WAIT_S, REFUSALS_PER_S, Patience
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Tenant, new_key


class Hands:
    """A clock that stands still, and sleeps that are only noted."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        self.gate: asyncio.Event | None = None
        self.is_full = asyncio.Event()  # MAX_HELD sleep

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) == MAX_HELD:
            self.is_full.set()
        if self.gate is not None:
            await self.gate.wait()


async def says(scope, receive, send):
    """An application that answers with the status the path asks for, to the tenant the query names."""
    request = Request(scope)
    if request.url.query:
        request.state.tenant = Tenant(request.url.query, "")
    await PlainTextResponse("", int(request.url.path[1:]))(scope, receive, send)


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def patience(hands) -> Patience:
    return Patience(says, clock=hands.clock, sleep=hands.sleep)


@pytest.fixture
async def client(patience):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(patience), base_url="http://test") as client:
        yield client


async def test_a_burst_is_refused_at_once_and_what_follows_in_turn(client, hands):
    for _ in range(BURST):
        assert (await client.get("/400?acme")).status_code == 400
    assert hands.slept == []
    for _ in range(3):
        await client.get("/404?acme")
    assert hands.slept == pytest.approx([0, 1 / REFUSALS_PER_S, 2 / REFUSALS_PER_S][1:])


async def test_time_pays_back(client, hands):
    for _ in range(2 * BURST):
        await client.get("/400?acme")
    hands.slept.clear()
    hands.now += 2 * BURST / REFUSALS_PER_S
    for _ in range(BURST):
        await client.get("/400?acme")
    assert hands.slept == []


async def test_only_refusals_wait_and_only_those_of_the_sender(client, hands):
    for _ in range(2 * BURST):
        await client.get("/429?acme")
    hands.slept.clear()
    for path in ("/200?acme", "/503?acme", "/500?acme", "/400?other", "/401"):
        await client.get(path)
    assert hands.slept == []


async def test_without_a_tenant_the_address_is_who_sends(client, hands):
    for _ in range(BURST + 2):
        await client.get("/401")
    assert len(hands.slept) == 1


async def test_waiting_is_bounded(client, patience, hands):
    hands.gate = asyncio.Event()
    flood = [asyncio.create_task(client.get("/400?acme")) for _ in range(3 * MAX_HELD)]
    await hands.is_full.wait()
    assert patience.num_held == MAX_HELD
    assert max(hands.slept) <= MAX_WAIT_S
    told = await asyncio.wait_for(asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED), 30)
    assert told[0]  # whoever finds too many waiting is told at once
    hands.gate.set()
    assert {(await task).status_code for task in flood} == {400}
    assert patience.num_held == 0


async def test_a_debt_is_bounded_too(client, hands):
    for _ in range(5 * int(REFUSALS_PER_S * MAX_WAIT_S)):
        await client.get("/400?acme")
    hands.slept.clear()
    hands.now += MAX_WAIT_S + BURST / REFUSALS_PER_S + 0.1
    for _ in range(BURST):
        await client.get("/400?acme")
    assert hands.slept == []


async def test_senders_are_forgotten(client, patience):
    for number in range(MAX_SENDERS + 10):
        await client.get(f"/400?tenant{number}")
    assert len(patience._due) == MAX_SENDERS


async def test_the_surface_names_the_tenant(data, monkeypatch):
    """Behind the real routes: one tenant's garbage waits, with a key or at a path that is not there."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(Patience.__init__, "__kwdefaults__", {"clock": lambda: 100.0, "sleep": sleep})
    keys = {name: new_key() for name in ("acme", "other")}
    book = KeyBook([KeyRecord(digest, Tenant(name, name)) for name, (_, digest) in keys.items()])
    service = make_service({"m": make_flow(make_card(data, "m"), Decoder())}, keys=book)
    transport = httpx.ASGITransport(make_app(service, is_patient=True))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for _ in range(BURST + 5):
            await client.post(
                "/v1/chat/completions", json={"model": 5}, headers={"Authorization": f"Bearer {keys['acme'][0]}"}
            )
        assert len(slept) == 4
        response = await client.post(
            "/v1/chat/completions", json={"model": 5}, headers={"Authorization": f"Bearer {keys['other'][0]}"}
        )
        assert response.status_code == 400
        assert len(slept) == 4
        await client.get("/nowhere", headers={"Authorization": f"Bearer {keys['acme'][0]}"})
        assert len(slept) == 5
