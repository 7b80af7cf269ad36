"""The decode pool: pictures are decoded in child processes, under limits of time, CPU and memory.

    prepare() --job--> queue --> _serve() x num_workers, each with a DecodeProcess of its own

A job that breaks its process or outlasts its time costs that process and gives its caller an error; the queue
goes on with a new one. Nobody else notices.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from omnilmm.config import ImageLimits, ImagePolicy
from omnilmm.errors import ImageError, Overloaded, StartupError
from omnilmm.image.headers import Size
from omnilmm.image.process import DecodeProcess
from omnilmm.image.source import check_picture, located
from omnilmm.image.transform import check_pillow, prepare
from omnilmm.messages import PreparedImage

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0
_GRACE_S = 0.25
"""How long a picture nobody waits for any more may go on: finishing is mostly quicker than a new process."""


@dataclass(frozen=True, slots=True)
class _Job:
    data: bytes
    policy: ImagePolicy
    sizes: frozenset[Size]
    answer: asyncio.Future[PreparedImage]


class DecodePool:
    """Decodes pictures in `num_workers` child processes; at most `max_queue` pictures wait for one.

    An `ImagePreparer`. Started by the first call or by `start`; whoever makes it closes it, or uses it as an
    async context manager. It belongs to the event loop it was first used on.
    """

    def __init__(self, limits: ImageLimits | None = None, *, num_workers: int = 2, max_queue: int = 64) -> None:
        self._limits = limits or ImageLimits()
        self._num_workers = num_workers
        self._max_queue = max_queue
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._processes: list[DecodeProcess | None] = [None] * num_workers
        self._servers: list[asyncio.Task[None]] = []
        self._starting = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The child processes that run now."""
        return tuple(process.pid for process in self._processes if process is not None and process.is_alive)

    @property
    def num_waiting(self) -> int:
        return self._jobs.qsize()

    async def start(self) -> None:
        """Starts every worker that does not run yet, and waits until all are ready.

        Raises:
            StartupError: one could not be started. None is left running.
        """
        async with self._starting:
            if self._servers or self._closed:
                return
            starts = (self._start_process(slot) for slot in range(self._num_workers))
            try:
                for outcome in await asyncio.gather(*starts, return_exceptions=True):
                    if isinstance(outcome, BaseException):
                        raise outcome
            except BaseException:
                await self._close_processes()
                raise
            self._servers = [asyncio.create_task(self._serve(slot)) for slot in range(self._num_workers)]

    async def prepare(self, data: bytes, *, policy: ImagePolicy, param: str) -> PreparedImage:
        """See `ports.ImagePreparer`. What the header already tells is refused without a worker.

        Raises:
            ImageError: the picture is not one we take, takes too long, or broke its decoder.
            PayloadTooLarge: image_file_too_large.
            Overloaded: too many pictures wait already, no worker can be started, or the pool is closed.
        """
        with located(param):
            width, height = check_picture(data, self._limits)
            try:
                await self.start()
            except StartupError:
                logger.exception("the decode workers could not be started; the next picture tries again")
                raise _overloaded() from None
            if self._closed or self._jobs.qsize() >= self._max_queue:
                raise _overloaded()
            answer: asyncio.Future[PreparedImage] = asyncio.get_running_loop().create_future()
            sizes = frozenset({(width, height), (height, width)})  # it may come back turned
            self._jobs.put_nowait(_Job(data, policy, sizes, answer))
            return await answer

    async def close(self) -> None:
        """Ends every worker; pictures still waiting or in work fail with Overloaded. Safe to call twice."""
        self._closed = True
        async with self._starting:
            for server in self._servers:
                server.cancel()
            await asyncio.gather(*self._servers, return_exceptions=True)
            while not self._jobs.empty():
                _fail(self._jobs.get_nowait(), _overloaded())
            await self._close_processes()

    async def _serve(self, slot: int) -> None:
        """Owns one worker: takes a job, has it done, replaces the worker where needed, for ever."""
        while True:
            job = await self._jobs.get()
            if job.answer.done():
                continue  # its caller left while it waited
            try:
                process = self._processes[slot]
                if process is None or not process.is_alive:
                    process = await self._replace_process(slot)
                if not await self._run(job, process):
                    logger.warning("decode worker %d is killed and replaced", process.pid)
                    await self._replace_process(slot)
            except Exception:
                logger.exception("a decode worker could not be replaced; the next picture tries again")
            finally:
                _fail(job, _overloaded())  # only where nobody answered: it was not this picture's fault

    async def _run(self, job: _Job, process: DecodeProcess) -> bool:
        """Answers the job; False if the process cannot be used any more."""
        exchange = asyncio.create_task(process.ask(job.data, job.policy, job.sizes))
        try:
            await asyncio.wait(
                {exchange, job.answer},
                timeout=self._limits.decode_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if job.answer.done():  # the caller left
                await asyncio.wait({exchange}, timeout=_GRACE_S)
        finally:
            exchange.cancel()
            await asyncio.wait({exchange})
        try:
            picture = exchange.result()
        except ImageError as refusal:
            _fail(job, refusal)
            return True
        except asyncio.CancelledError:
            _fail(job, _broken("The picture takes too long to decode."))
            return False
        except Exception:  # ProcessLost; whatever it is, the next picture must find a server
            _fail(job, _broken("The picture could not be decoded."))
            return False
        if not job.answer.done():
            job.answer.set_result(picture)
        return True

    async def _start_process(self, slot: int) -> DecodeProcess:
        process = await DecodeProcess.start(self._limits)
        self._processes[slot] = process
        return process

    async def _replace_process(self, slot: int) -> DecodeProcess:
        process, self._processes[slot] = self._processes[slot], None
        if process is not None:
            await process.close()
        return await self._start_process(slot)

    async def _close_processes(self) -> None:
        for slot, process in enumerate(self._processes):
            if process is not None:
                await process.close()
                self._processes[slot] = None


class InlinePreparer:
    """Decodes in this process, on threads of the event loop's executor: for the library and for tests.

    An `ImagePreparer` with the same checks and the same pixels as `DecodePool`, but nothing bounds the time and the
    memory of a decoder, so it is not for strangers' files.
    """

    def __init__(self, limits: ImageLimits | None = None) -> None:
        check_pillow()
        self._limits = limits or ImageLimits()

    async def prepare(self, data: bytes, *, policy: ImagePolicy, param: str) -> PreparedImage:
        """See `ports.ImagePreparer`."""
        return await asyncio.to_thread(prepare, data, policy=policy, limits=self._limits, param=param)


def _fail(job: _Job, error: Exception) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)


def _broken(message: str) -> ImageError:
    return ImageError(message, code="image_parse_error")


def _overloaded() -> Overloaded:
    return Overloaded("The server cannot decode more pictures right now.", retry_after=_RETRY_AFTER_S)
