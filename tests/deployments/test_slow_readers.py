"""Clients that do not read, over real sockets: who is cut, when, and who is not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.middleware import Middleware

from cluster.local import RAY_ENVIRONMENT, proxy_environment
from deployments.repeating import RepeatedRefusals
from deployments.settings import MAX_STREAM_VARIABLE, SLOW_READER_VARIABLE, AppSettings
from deployments.slow_readers import SlowReaders, proxy_middleware

NEVER_S = 600.0
LIMIT_S = 60.0  # of a test that waits for something that has to come
PIECE = b"x" * 4096
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Endless:
    """Says PIECE again and again until its client has left."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()

    async def __call__(self, scope, receive, send):
        leaves = asyncio.create_task(self._leaves(receive))
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        while not leaves.done():
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            await asyncio.sleep(0)
        self.has_ended.set()

    async def _leaves(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass


class Whole:
    """Says a body and its length at once, and is told when all of it was taken."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.has_ended = asyncio.Event()

    async def __call__(self, scope, receive, send):
        length = str(len(self.body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})
        self.has_ended.set()


class Pauses:
    """A stream that is silent for a while; nobody's fault but its own."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for is_more in (True, False):
            await send({"type": "http.response.body", "body": PIECE, "more_body": is_more})
            await asyncio.sleep(self._seconds)


class Cuts:
    def __init__(self) -> None:
        self.num = 0
        self.has_cut = asyncio.Event()

    def __call__(self) -> None:
        self.num += 1
        self.has_cut.set()


@pytest.fixture
def cuts() -> Cuts:
    return Cuts()


@pytest.fixture
def readers(cuts) -> Callable[..., SlowReaders]:
    def make(app, *, patience_s: float = NEVER_S, max_stream_s: float = NEVER_S) -> SlowReaders:
        return SlowReaders(app, patience_s=patience_s, max_stream_s=max_stream_s, note_cut=cuts)

    return make


@asynccontextmanager
async def served(app) -> AsyncIterator[uvicorn.Server]:
    """The application behind uvicorn on this event loop."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_config=None, lifespan="off", timeout_keep_alive=int(NEVER_S), timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve([listening]))  # serve() would take over the signals
    server.address = listening.getsockname()  # type: ignore[attr-defined]
    try:
        yield server
    finally:
        server.should_exit = True
        await running
        listening.close()


@asynccontextmanager
async def asking(server) -> AsyncIterator[socket.socket]:
    """A client that has asked, and can take next to nothing without reading."""
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # so the sender's kernel buffers little as well
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, server.address)
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        yield client


async def read_all(client: socket.socket, until: Callable[[bytes], bool]) -> bytes:
    """Read on until `until` says it is enough, or the connection's end."""
    received = b""
    while not until(received):
        piece = await asyncio.get_running_loop().sock_recv(client, 1 << 16)
        if not piece:
            break
        received += piece
    return received


def body_of(response: bytes) -> bytes:
    return response.partition(b"\r\n\r\n")[2]


async def test_who_reads_nothing_is_cut(readers, cuts):
    app = Endless()
    async with asyncio.timeout(LIMIT_S), served(readers(app, patience_s=0.2)) as server, asking(server) as client:
        await cuts.has_cut.wait()
        await app.has_ended.wait()
        with pytest.raises(ConnectionResetError):
            await read_all(client, lambda received: False)
    assert cuts.num == 1


async def test_a_stream_whose_reader_is_behind_is_cut_when_it_has_had_its_time(readers, cuts):
    app = Endless()
    slow = readers(app, max_stream_s=0.2)
    async with asyncio.timeout(LIMIT_S), served(slow) as server, asking(server):
        await cuts.has_cut.wait()
        await app.has_ended.wait()
    assert cuts.num == 1


async def test_who_reads_may_have_a_long_stream(readers, cuts):
    quiet = readers(Pauses(0.2), patience_s=0.1, max_stream_s=0.1)
    async with asyncio.timeout(LIMIT_S), served(quiet) as server, asking(server) as client:
        received = await read_all(client, lambda received: received.endswith(b"0\r\n\r\n"))
    assert received.count(PIECE) == 2
    assert cuts.num == 0


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 1_000_000])
async def test_a_long_body_arrives_as_it_was_said(readers, cuts, size):
    body = bytes(index % 251 for index in range(size))
    async with asyncio.timeout(LIMIT_S), served(readers(Whole(body))) as server, asking(server) as client:
        received = await read_all(
            client, lambda received: b"\r\n\r\n" in received and len(body_of(received)) >= len(body)
        )
    assert body_of(received) == body
    assert cuts.num == 0


async def test_a_long_body_that_nobody_reads_is_not_kept(readers, cuts):
    app = Whole(b"x" * 4_000_000)
    async with asyncio.timeout(LIMIT_S), served(readers(app, patience_s=0.2)) as server, asking(server):
        await cuts.has_cut.wait()
        await app.has_ended.wait()
    assert cuts.num == 1


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such option")
async def test_what_is_left_after_the_last_write_is_not_kept_either(readers, cuts):
    app = Whole(b"x" * 100_000)
    async with asyncio.timeout(LIMIT_S), served(readers(app, patience_s=0.5)) as server, asking(server):
        await app.has_ended.wait()
        assert server.server_state.connections
        while server.server_state.connections:  # noqa: ASYNC110 - nothing tells when the kernel gives up
            await asyncio.sleep(0.05)
    assert cuts.num == 0  # nobody here did that


async def test_without_a_connection_nothing_is_changed(readers):
    """Another server, or one that somebody has wrapped."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.disconnect"}

    await readers(Whole(b"x" * 100_000))({"type": "http"}, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_every_proxy_gets_what_the_settings_say(monkeypatch, data):
    (module, _, function) = RAY_ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert (module, function) == (proxy_middleware.__module__, proxy_middleware.__name__)
    models = [{"name": "m", "path": str(data / "minicpm-v-tiny")}]
    router = {"slow_reader_s": 7, "request_timeout_s": 20}
    for name, value in proxy_environment(AppSettings.model_validate({"models": models, "router": router})).items():
        monkeypatch.setenv(name, value)
    repeated, middleware = proxy_middleware()  # the outermost comes last
    assert isinstance(middleware, Middleware)
    assert repeated.cls is RepeatedRefusals
    assert middleware.cls is SlowReaders
    assert (middleware.kwargs["patience_s"], middleware.kwargs["max_stream_s"]) == (7.0, 27.0)


def test_without_settings_the_defaults_hold(monkeypatch):
    monkeypatch.delenv(SLOW_READER_VARIABLE, raising=False)
    monkeypatch.delenv(MAX_STREAM_VARIABLE, raising=False)
    _, middleware = proxy_middleware()
    assert (middleware.kwargs["patience_s"], middleware.kwargs["max_stream_s"]) == (30.0, 330.0)
