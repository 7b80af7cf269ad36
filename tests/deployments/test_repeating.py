"""Refusals said again in the proxy: to whom, for how long, and to nobody else."""

from __future__ import annotations

import json
import logging

import httpx
import pytest

from deployments import repeating
from deployments.repeating import MARK, MAX_BODY_BYTES, RepeatedRefusals, mark_of
from omnilmm.errors import Overloaded, QueueFull

CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer sk-omni-mine"}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Behind:
    """What is behind the proxy. It says `answer`, in two pieces, and notes what comes."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.status = 503
        self.headers: dict[str, str] = {"Retry-After": "1", "Content-Type": "application/json", "X-Request-ID": "first"}
        self.answer = json.dumps(Overloaded("Too many answers are being given.").body()).encode()
        self.refuse("m", 0.5)

    def refuse(self, model: str, lasts_s: float) -> None:
        full = QueueFull("full")
        full.model, full.lasts_s = model, lasts_s
        self.headers[MARK] = mark_of(full)

    def admit(self) -> None:
        self.status = 200
        self.headers.pop(MARK)

    async def __call__(self, scope, receive, send):
        body, is_more = b"", True
        while is_more:
            message = await receive()
            body += message["body"]
            is_more = message.get("more_body", False)
        self.bodies.append(body)
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.answer[:7], "more_body": True})
        await send({"type": "http.response.body", "body": self.answer[7:]})


class Proxy:
    def __init__(self) -> None:
        self.behind = Behind()
        self.clock = Clock()
        self.repeated: list[str] = []
        self.app = RepeatedRefusals(self.behind, note_repeated=self.repeated.append, clock=self.clock)

    async def post(self, model: str = "m", *, path: str = CHAT, headers=KEY, peer: str = "10.0.0.1", **more):
        transport = httpx.ASGITransport(self.app, client=(peer, 5000))
        content = more.get("content") or json.dumps({"model": model} | more)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=content, headers=headers)

    @property
    def num_passed(self) -> int:
        return len(self.behind.bodies)


@pytest.fixture
async def proxy():
    """One that has seen a refusal."""
    proxy = Proxy()
    first = await proxy.post()
    assert (first.status_code, first.headers["Retry-After"], proxy.num_passed) == (503, "1", 1)
    return proxy


async def test_the_same_is_refused_in_the_same_words_without_a_call(proxy):
    again = await proxy.post(messages=["of which the router sees nothing"])
    assert proxy.num_passed == 1
    assert (again.status_code, again.content) == (503, proxy.behind.answer)
    assert (again.headers["Retry-After"], again.headers["Content-Type"]) == ("1", "application/json")
    assert proxy.repeated == ["m"], "who looks at the counter sees it"


async def test_every_answer_has_a_request_id_of_its_own(proxy):
    named = await proxy.post(headers=KEY | {"X-Request-ID": "mine"})
    drawn = [(await proxy.post()).headers.get_list("x-request-id") for _ in range(2)]
    assert named.headers.get_list("x-request-id") == ["mine"]
    assert len({one for (one,) in drawn} | {"first", "mine"}) == 4
    assert proxy.num_passed == 1


async def test_the_mark_is_for_the_proxy_alone(proxy):
    proxy.clock.now += 1
    assert MARK not in (await proxy.post()).headers, "as the router said it"
    assert MARK not in (await proxy.post()).headers, "as it is said again"
    assert proxy.num_passed == 2


@pytest.mark.parametrize(
    "other",
    [
        {"headers": {"Authorization": "Bearer sk-omni-another"}},
        {"headers": {}},
        {"model": "another"},
        {"model": "m:adapter"},
        {"path": "/v1/completions"},
        {"content": b"{"},
        {"content": b"[]"},
        {"content": b'{"model": ["m"]}'},
        {"content": b"[" * 10_000},
    ],
)
async def test_whoever_was_not_refused_is_heard(proxy, other):
    await proxy.post(**other)
    assert proxy.num_passed == 2
    assert proxy.repeated == []


async def test_it_ends_in_time(proxy):
    proxy.behind.admit()
    proxy.clock.now += 0.49
    assert (await proxy.post()).status_code == 503
    proxy.clock.now += 0.02
    assert (await proxy.post()).status_code == 200, "saying it again made it no longer"
    assert (await proxy.post()).status_code == 200, "and who was let in is not refused for what was before"


async def test_what_is_not_marked_is_not_said_again():
    proxy = Proxy()
    del proxy.behind.headers[MARK]
    await proxy.post()
    await proxy.post()
    assert proxy.num_passed == 2


@pytest.mark.parametrize("mark", ["", "{}", "[]", '{"model": "m", "seconds": "x"}'])
async def test_a_mark_that_cannot_be_read_is_none(mark, caplog):
    proxy = Proxy()
    proxy.behind.headers[MARK] = mark
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        assert [(await proxy.post()).status_code for _ in range(2)] == [503, 503]
    assert proxy.num_passed == 2


async def test_without_keys_people_are_told_apart_by_address():
    proxy = Proxy()
    for peer, num_passed in (("10.0.0.1", 1), ("10.0.0.1", 1), ("10.0.0.2", 2)):
        await proxy.post(headers={}, peer=peer)
        assert proxy.num_passed == num_passed


async def test_models_are_remembered_side_by_side(proxy):
    proxy.behind.refuse("n", 0.5)
    await proxy.post("n")
    await proxy.post("n")
    await proxy.post("m")
    assert (proxy.num_passed, proxy.repeated) == (2, ["n", "m"])


@pytest.mark.parametrize("num_bytes", [0, 10_000, MAX_BODY_BYTES, 5 * MAX_BODY_BYTES])
async def test_a_body_that_was_looked_at_arrives_whole(proxy, num_bytes):
    sent = json.dumps({"model": "another", "text": "x" * num_bytes}).encode()

    async def pieces():
        for start in range(0, len(sent), 5000):
            yield sent[start : start + 5000]

    await proxy.post(content=pieces())
    assert proxy.behind.bodies[-1] == sent


async def test_a_long_body_goes_to_the_router(proxy):
    await proxy.post(text="x" * MAX_BODY_BYTES)
    assert proxy.num_passed == 2


async def test_a_client_that_leaves_early_is_left_to_the_router(proxy):
    arrives = iter([{"type": "http.request", "body": b'{"model"', "more_body": True}, {"type": "http.disconnect"}])
    seen = []

    async def receive():
        return next(arrives)

    async def look(scope, receive, send):
        seen.extend([await receive(), await receive()])

    proxy.app._app = look
    scope = {"type": "http", "method": "POST", "path": CHAT, "client": None}
    await proxy.app(scope | {"headers": [(b"authorization", b"Bearer sk-omni-mine")]}, receive, None)
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


async def test_keys_are_not_kept(proxy):
    (asked,) = proxy.app._refusals
    assert "sk-omni-mine" not in repr(asked)


async def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(repeating, "MAX_REMEMBERED", 3)
    proxy = Proxy()
    for peer in range(5):
        await proxy.post(headers={}, peer=f"10.0.0.{peer}")
    assert len(proxy.app._refusals) == 3
    await proxy.post(headers={}, peer="10.0.0.4")
    assert proxy.num_passed == 5
    await proxy.post(headers={}, peer="10.0.0.0")
    assert proxy.num_passed == 6
