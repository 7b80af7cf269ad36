"""Load from processes of their own: one per client, so that nobody's clock waits for somebody else's bytes.

A plan is one client: what it sends, on how many connections or how often. `Load` runs plans side by side, each by
`python bench_load.py`, which reads the plan as JSON from its standard input and writes what it saw as JSON to its
standard output. A client is one event loop over plain sockets: requests are bytes made beforehand, and of an answer no
more is read than where a token came and where it ends (about 30 us a request and 10 us an event).

Open loop: requests leave when their time has come, whatever became of those before (and lateness counts: times are
from when a request was due). Closed loop: as many connections as were asked for, each with the next request as soon as
the last one has ended.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MAX_CONNECTIONS = 1500


@dataclass(frozen=True, slots=True)
class Plan:
    """One client. `bodies` are sent in turn, from the start again when all are sent; `{n}` in one becomes a number
    that no other request has. With `rate` (a second) the loop is open and arrivals are Poisson's; else `connections`
    are kept busy. Counted is what was due from `warm_up_s` to `warm_up_s + seconds`; whoever has no answer `grace_s`
    after that is left."""

    name: str
    url: str
    key: str
    bodies: tuple[str, ...]
    seconds: float
    warm_up_s: float = 0.0
    rate: float | None = None
    connections: int = 1
    seed: int = 0
    path: str = "/v1/chat/completions"
    grace_s: float = 60.0


@dataclass(slots=True)
class Seen:
    """One request: seconds since the plan began, all but `late`, which is how far behind its time it left."""

    due: float
    status: int = 0  # 0: the connection broke
    first: float | None = None  # its first token
    end: float | None = None
    pieces: int = 0  # events with text
    retry_after: str | None = None
    is_whole: bool = False  # the stream ended with [DONE], any other answer with its last byte
    late: float = 0.0


@dataclass(slots=True)
class Report:
    """What one client saw, of the requests that count; `cpu_s` is what the client itself took."""

    name: str
    seconds: float
    cpu_s: float
    requests: list[Seen] = field(default_factory=list)
    num_served: int = 0  # answers that ended well within the time that counts, whenever they began
    num_unsent: int = 0

    @property
    def answered(self) -> list[Seen]:
        return [seen for seen in self.requests if seen.status == 200 and seen.is_whole]

    @property
    def ttfts(self) -> list[float]:
        return sorted(seen.first - seen.due for seen in self.requests if seen.status == 200 and seen.first is not None)

    @property
    def refused(self) -> list[Seen]:
        return [seen for seen in self.requests if seen.status in (429, 503)]

    @property
    def broken(self) -> list[Seen]:
        return [seen for seen in self.requests if seen.status == 0 or (seen.status == 200 and not seen.is_whole)]

    def count(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for seen in self.requests:
            counts[seen.status] = counts.get(seen.status, 0) + 1
        return dict(sorted(counts.items()))


def quantile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of numbers in order; NaN of none."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


@contextmanager
def running(plans: Sequence[Plan]) -> Iterator[list[subprocess.Popen[str]]]:
    """The clients of these plans, from now on; killed at the end if they have not ended by then."""
    clients = []
    try:
        for plan in plans:
            command = [sys.executable, __file__]
            client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            clients.append(client)
            assert client.stdin is not None
            client.stdin.write(json.dumps(asdict(plan)))
            client.stdin.close()
        yield clients
    finally:
        for client in clients:
            client.kill()
            client.wait()


def report_of(client: subprocess.Popen[str]) -> Report:
    """Wait for a client's end and read what it saw."""
    assert client.stdout is not None
    document = json.loads(client.stdout.read())
    return Report(**document | {"requests": [Seen(*row) for row in document["requests"]]})


def load(*plans: Plan) -> list[Report]:
    """Run plans side by side to their end."""
    with running(plans) as clients:
        return [report_of(client) for client in clients]


# -- the client process -------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """Keep-alive: one request after the other."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self.seen: Seen | None = None
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._in_body = False
        self._left: int | None = None  # bytes of a body with a length; None: chunks
        self._is_closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes, seen: Seen) -> None:
        assert self._transport is not None
        self.seen, self._buffer, self._in_body, self._left = seen, b"", False, None
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.seen is None:
            return
        if not self._in_body:
            self._buffer += data
            head, gap, data = self._buffer.partition(b"\r\n\r\n")
            if not gap:
                return
            self._read_head(head)
        self._read_body(data)

    def _read_head(self, head: bytes) -> None:
        assert self.seen is not None
        status, *lines = head.split(b"\r\n")
        self.seen.status = int(status.split(b" ", 2)[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if b"retry-after" in headers:
            self.seen.retry_after = headers[b"retry-after"].decode()
        self._left = int(headers[b"content-length"]) if b"content-length" in headers else None
        self._is_closing = headers.get(b"connection", b"").lower() == b"close"
        self._in_body, self._buffer = True, b""

    def _read_body(self, data: bytes) -> None:
        seen = self.seen
        assert seen is not None
        if self._left is not None:
            self._left -= len(data)
            if self._left <= 0:
                seen.is_whole = True
                self._finish()
            return
        if num_pieces := data.count(b'"content":"') - data.count(b'"content":""'):
            if seen.first is None:
                seen.first = self._client.now()
            seen.pieces += num_pieces
        tail = (self._buffer + data)[-32:]
        self._buffer = tail
        if b"[DONE]" in tail:
            seen.is_whole = True
        if tail.endswith(b"0\r\n\r\n"):
            self._finish()

    def _finish(self) -> None:
        seen, self.seen = self.seen, None
        assert seen is not None
        assert self._transport is not None
        seen.end = self._client.now()
        if self._is_closing:
            self._transport.close()
        self._client.free(self, is_open=not self._is_closing)

    def connection_lost(self, error: Exception | None) -> None:
        if self.seen is not None:
            self.seen.end, self.seen = self._client.now(), None
            self._client.free(self, is_open=False)
        else:
            self._client.drop(self)


class _Client:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._host, self._port = plan.url.removeprefix("http://").split(":")
        self._begun = 0.0
        self._until = plan.warm_up_s + plan.seconds
        self._idle: deque[_Connection] = deque()
        self._num_busy = 0
        self._sent: list[Seen] = []
        self._num_unsent = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._number = 0

    def now(self) -> float:
        return time.monotonic() - self._begun

    async def run(self) -> dict[str, Any]:
        plan = self._plan
        self._begun = time.monotonic()
        if plan.rate is None:
            for _ in range(plan.connections):
                self._send_soon(self.now())
        else:
            await self._send_on_time(plan.rate)
        await asyncio.sleep(max(0.0, self._until - self.now()))
        deadline = self.now() + plan.grace_s
        while self._num_busy and self.now() < deadline:
            self._ended.clear()
            try:
                async with asyncio.timeout(1.0):
                    await self._ended.wait()
            except TimeoutError:
                pass
        counted = [s for s in self._sent if plan.warm_up_s <= s.due < self._until]
        usage = os.times()
        return {
            "name": plan.name,
            "seconds": plan.seconds,
            "cpu_s": usage.user + usage.system,
            "requests": [
                [s.due, s.status, s.first, s.end, s.pieces, s.retry_after, s.is_whole, s.late] for s in counted
            ],
            "num_served": sum(
                s.status == 200 and s.is_whole and plan.warm_up_s <= _end(s) < self._until for s in self._sent
            ),
            "num_unsent": self._num_unsent,
        }

    async def _send_on_time(self, rate: float) -> None:
        draw = random.Random(self._plan.seed)
        due = draw.expovariate(rate)
        while due < self._until:
            await asyncio.sleep(max(0.0, due - self.now()))
            if self._num_busy < MAX_CONNECTIONS:
                self._send_soon(due)
            else:
                self._num_unsent += 1
            due += draw.expovariate(rate)

    def _send_soon(self, due: float) -> None:
        seen = Seen(due)
        self._sent.append(seen)
        self._num_busy += 1
        if self._idle:
            self._send(self._idle.pop(), seen)
        else:
            task = asyncio.get_running_loop().create_task(self._connect(seen))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, seen: Seen) -> None:
        try:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(lambda: _Connection(self), self._host, int(self._port))
        except OSError:
            seen.end = self.now()
            self._num_busy -= 1
            self._ended.set()
            return
        self._send(connection, seen)

    def _send(self, connection: _Connection, seen: Seen) -> None:
        seen.late = self.now() - seen.due
        connection.send(self._request(), seen)

    def _request(self) -> bytes:
        self._number += 1
        body = self._plan.bodies[self._number % len(self._plan.bodies)]
        data = body.replace("{n}", f"{self._plan.name}{self._number}").encode()
        return (
            f"POST {self._plan.path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {self._plan.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        ).encode() + data

    def free(self, connection: _Connection, *, is_open: bool) -> None:
        self._num_busy -= 1
        self._ended.set()
        if is_open:
            self._idle.append(connection)
        if self._plan.rate is None and self.now() < self._until:
            # a broken or closed connection is not made anew at once: that would be a busy loop against a dead server
            if is_open:
                self._send_soon(self.now())
            else:
                asyncio.get_running_loop().call_later(0.05, lambda: self._send_soon(self.now()))

    def drop(self, connection: _Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)


def chat_body(model: str, prompt: str, *, max_tokens: int, **more: Any) -> str:
    """A streamed greedy answer of exactly so many tokens."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    return json.dumps(body | more)


def _end(seen: Seen) -> float:
    return float("inf") if seen.end is None else seen.end


def _plan_of(document: Mapping[str, Any]) -> Plan:
    return Plan(**document | {"bodies": tuple(document["bodies"])})


def _main() -> None:
    plan = _plan_of(json.loads(sys.stdin.read()))
    gc.freeze()
    gc.disable()  # a plan is over before garbage matters, and a collection would be read as the server's slowness
    print(json.dumps(asyncio.run(_Client(plan).run())))


if __name__ == "__main__":
    assert Path(__file__).is_absolute()
    _main()
