"""Readers that do not read are cut, where their bytes lie: in Serve's proxy.

Serve takes from the router whatever it says, as fast as it says it, whether or not somebody reads it. So an answer that
nobody reads is computed all the same, frees its place, and its bytes pile up: first in the sockets of both sides, then
in the proxy's server (uvicorn stops the proxy at 64 KiB), and what comes after in the router. Only the proxy can see
how fast a reader is: while the socket is full its `send` does not return. This middleware runs there. Every process of
Serve that speaks HTTP asks `proxy_middleware` for it, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.

A connection that is cut looks to the proxy as if its client had left, which ends the answer everywhere, at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.repeating import RepeatedRefusals
from deployments.settings import reader_limits

PIECE_BYTES = 64 * 1024
"""Of a body at a time: as much as uvicorn's transport holds before it makes the writer wait."""

logger = logging.getLogger("ray.serve")


class SlowReaders:
    """ASGI middleware, the outermost: it needs the server's own `send`.

    Args:
        app: what answers.
        patience_s: how long one write of up to PIECE_BYTES may wait for the reader. Who reads at least 64 KiB in that
            time is never cut for this.
        max_stream_s: how long an event stream may take, from its headers to its last byte.
        note_cut: called for each connection that is cut.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        patience_s: float,
        max_stream_s: float,
        note_cut: Callable[[], None] = lambda: None,
    ) -> None:
        self._app = app
        self._patience_s = patience_s
        self._max_stream_s = max_stream_s
        self._note_cut = note_cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = _transport_of(send)
        if scope["type"] != "http" or transport is None:
            await self._app(scope, receive, send)
            return
        self._have_kernel_cut(transport)
        loop = asyncio.get_running_loop()
        cut = partial(self._cut, transport)
        limits: list[asyncio.TimerHandle] = []

        async def send_in_time(message: Message) -> None:
            if _begins_stream(message):
                limits.append(loop.call_later(self._max_stream_s, cut))
            for piece in _pieces(message):
                limit = loop.call_later(self._patience_s, cut)
                try:
                    await send(piece)
                finally:
                    limit.cancel()

        try:
            await self._app(scope, receive, send_in_time)
        finally:
            for limit in limits:
                limit.cancel()

    def _have_kernel_cut(self, transport: asyncio.Transport) -> None:
        """What is left when the last write is over is the kernel's to watch: whoever reads none of it for twice the
        patience is cut there (RFC 5482; where there is no such option, when the client has gone)."""
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection = transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # it is gone already, or no TCP
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * self._patience_s))

    def _cut(self, transport: asyncio.Transport) -> None:
        if not transport.get_write_buffer_size():
            return  # its reader has everything we have, or is gone
        logger.info("cut a connection whose client reads too slowly")
        self._note_cut()
        no_linger = struct.pack("ii", 1, 0)  # closing resets, and the kernel drops what nobody read
        with contextlib.suppress(OSError):  # no TCP
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        transport.abort()


def proxy_middleware() -> list[Middleware]:
    """For Serve to call in each proxy; the outermost comes last."""
    from ray.util.metrics import Counter

    cuts = Counter("omnilmm_slow_readers_cut", "Connections cut because their clients read too slowly.")
    repeated = Counter(
        "omnilmm_refusals_repeated",
        "Refusals that a router's earlier one stood for.",
        tag_keys=("model",),
    )
    patience_s, max_stream_s = reader_limits()
    return [
        Middleware(RepeatedRefusals, note_repeated=lambda model: repeated.inc(tags={"model": model})),
        Middleware(SlowReaders, patience_s=patience_s, max_stream_s=max_stream_s, note_cut=cuts.inc),
    ]


def _transport_of(send: Send) -> asyncio.Transport | None:
    """The connection behind the server's `send`: ASGI has no word for it. None if the server is not uvicorn."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    return transport if hasattr(transport, "abort") else None  # uvloop's is no asyncio.Transport


def _begins_stream(message: Message) -> bool:
    if message["type"] != "http.response.start":
        return False
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
    )


def _pieces(message: Message) -> Iterator[Message]:
    """The message, a long body in several: each then waits for the reader, not only the next response."""
    body = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        is_last = start + PIECE_BYTES >= len(body)
        more_body = True if not is_last else message.get("more_body", False)
        yield {"type": message["type"], "body": body[start : start + PIECE_BYTES], "more_body": more_body}
