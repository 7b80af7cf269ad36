"""A TCP proxy in front of a unix socket that misbehaves on request: the network of the fault tests."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field


@dataclass
class FaultProxy:
    """Forwards bytes; each fault holds from the moment it is set, also for connections already open.

    `delay_s` holds back every answer; `black_hole` swallows everything both ways; `refuse` closes new connections at
    once; `bytes_per_s` throttles answers; `flip_at` inverts one bit of the nth answered byte of each connection.
    """

    upstream: str
    delay_s: float = 0.0
    black_hole: bool = False
    refuse: bool = False
    bytes_per_s: float | None = None
    flip_at: int | None = None
    num_accepted: int = 0
    num_bytes_asked: int = 0
    port: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _tasks: set[asyncio.Task] = field(default_factory=set)
    _server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Reset every open connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        self._writers.add(writer)
        self.num_accepted += 1
        try:
            if not self.refuse:
                await self._forward(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self.upstream)
        try:
            pumps = [
                asyncio.create_task(self._ask(reader, up_writer)),
                asyncio.create_task(self._answer(up_reader, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            up_writer.close()
            with contextlib.suppress(OSError):
                await up_writer.wait_closed()

    async def _ask(self, reader: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            self.num_bytes_asked += len(data)
            if not self.black_hole:
                up.write(data)
                await up.drain()

    async def _answer(self, up: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        num_sent = 0
        while data := await up.read(1 << 16):
            if self.black_hole:
                continue
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.flip_at is not None and num_sent <= self.flip_at < num_sent + len(data):
                damaged = bytearray(data)
                damaged[self.flip_at - num_sent] ^= 0x01
                data = bytes(damaged)
            num_sent += len(data)
            step = len(data) if self.bytes_per_s is None else max(1, int(self.bytes_per_s / 100))
            for start in range(0, len(data), step):
                writer.write(data[start : start + step])
                await writer.drain()
                if self.bytes_per_s is not None:
                    await asyncio.sleep(0.01)
