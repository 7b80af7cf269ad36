"""One decode child as its parent sees it: start it, ask it, kill it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Self

import omnilmm
from omnilmm.config import ImageLimits, ImagePolicy
from omnilmm.errors import ImageError, StartupError
from omnilmm.image import frames
from omnilmm.image.headers import Size
from omnilmm.messages import PreparedImage

_START_TIMEOUT_S = 30.0
_PIECE_BYTES = 256 * 1024


class ProcessLost(Exception):
    """The child died, or says things it must not say. It can only be closed."""


class DecodeProcess:
    """A child process that decodes one picture at a time. Made by `start`; to be ended by `close`.

    A call that is cancelled midway leaves half a frame in the pipe, so after it the child can only be closed.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._requests = process.stdin
        self._answers = process.stdout

    @classmethod
    async def start(cls, limits: ImageLimits) -> Self:
        """Starts a child and waits until it is ready.

        It inherits no environment but the import path, so that a broken decoder finds no secrets there.

        Raises:
            StartupError: it could not be started; its own complaint, if any, is on our standard error.
        """
        child = cls(await _spawn(limits))
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await child._read_frame(max_payload=0)
        except (ProcessLost, TimeoutError):
            await child.close()
            raise StartupError("A decode process did not come up.") from None
        except BaseException:
            await child.close()
            raise
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and not self._answers.at_eof()

    async def ask(self, data: bytes, policy: ImagePolicy, sizes: frozenset[Size]) -> PreparedImage:
        """Has one picture decoded. The answer must have one of `sizes`.

        Raises:
            ImageError: the picture is refused.
            ProcessLost: the child is of no further use, perhaps because of this picture.
        """
        await self._write_frame(frames.pack(frames.request_fields(policy), len(data)), data)
        fields, square = await self._read_frame(max_payload=3 * policy.side * policy.side)
        try:
            refusal = frames.refusal_of(fields)
            if refusal is None:
                return frames.picture_of(fields, square, side=policy.side, sizes=sizes)
        except frames.BadFrame:
            raise ProcessLost from None
        code, message = refusal
        raise ImageError(message, code=code)

    async def close(self) -> None:
        """Kills the child if it still runs and waits until nothing of it is left, cancelled or not."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if not self._requests.transport.is_closing():
            self._requests.transport.abort()
        # Reads what is left, or the pipe would never be found closed.
        ending = asyncio.ensure_future(self._process.communicate())
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait({ending})
            raise

    async def _write_frame(self, head: bytes, payload: bytes) -> None:
        try:
            self._requests.write(head)
            view = memoryview(payload)
            for start in range(0, len(view), _PIECE_BYTES):
                self._requests.write(view[start : start + _PIECE_BYTES])
                await self._requests.drain()
            await self._requests.drain()
        except (ConnectionError, RuntimeError):
            raise ProcessLost from None

    async def _read_frame(self, *, max_payload: int) -> tuple[dict[str, object], bytes]:
        try:
            fields_bytes, payload_bytes = frames.unpack_head(await self._answers.readexactly(frames.HEAD_BYTES))
            if payload_bytes > max_payload:
                raise ProcessLost
            fields = frames.unpack_fields(await self._answers.readexactly(fields_bytes))
            return fields, await self._answers.readexactly(payload_bytes)
        except (asyncio.IncompleteReadError, ConnectionError, frames.BadFrame):
            raise ProcessLost from None


async def _spawn(limits: ImageLimits) -> asyncio.subprocess.Process:
    """A child that has just been started. A cancellation waits until it can be taken back without a trace."""
    command = [sys.executable, "-P", "-m", "omnilmm.image.worker", json.dumps(asdict(limits)), str(os.getpid())]
    spawning = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_PIECE_BYTES,
            env={"PYTHONPATH": _import_path()},
            start_new_session=True,  # Ctrl-C in a terminal is for the parent alone
        )
    )
    try:
        return await asyncio.shield(spawning)
    except OSError:
        raise StartupError("A decode process could not be started.") from None
    except asyncio.CancelledError:
        await asyncio.wait({spawning})
        if spawning.exception() is None:
            await DecodeProcess(spawning.result()).close()
        raise


def _import_path() -> str:
    """What the child needs to find the same modules as we do."""
    package_root = Path(omnilmm.__file__).resolve().parents[1]
    return os.pathsep.join([str(package_root), *filter(None, sys.path)])
