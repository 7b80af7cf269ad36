"""The owner of the vision tower: one thread that takes of what is waiting as much as pays, and encodes it as one batch.

There is no timer. While a batch runs the next one gathers by itself; when nothing is running a lone picture
starts at once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from omnilmm.config import EncoderConfig
from omnilmm.encoder.batching import BatchSizes
from omnilmm.errors import DeadlineExceeded, OmniError, Overloaded, ReplicaLost
from omnilmm.messages import Embedding, PreparedImage
from omnilmm.observe import BatchEncoded, Observer

logger = logging.getLogger(__name__)


class BatchEncoder(Protocol):
    """What the loop needs of `encode.VisionEncoder`."""

    def encode(self, pictures: Sequence[PreparedImage]) -> list[Embedding | OmniError]: ...


@dataclass(frozen=True, slots=True)
class EncoderStats:
    """`num_pictures` counts pictures run through the tower since the start; `num_batches` the runs."""

    num_pictures: int
    num_batches: int
    num_waiting: int


@dataclass(slots=True)
class _Job:
    picture: PreparedImage
    result: asyncio.Future[Embedding]
    loop: asyncio.AbstractEventLoop
    arrived: float


class EncoderLoop:
    """Batches concurrent `encode` calls on a thread of its own."""

    def __init__(self, encoder: BatchEncoder, config: EncoderConfig, observer: Observer) -> None:
        self._encoder = encoder
        self._config = config
        self._observer = observer
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_waiting = 0  # touched by the event loop only
        self._stopping = False
        # The thread's own:
        self._backlog: deque[_Job] = deque()
        self._sizes = BatchSizes(config.max_batch)
        self._has_met_stop = False
        self._num_pictures = 0
        self._num_batches = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        assert self._thread is None, "started twice"
        self._thread = threading.Thread(target=self._run, name="vision-encoder", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        return not self._stopping and self._thread is not None and self._thread.is_alive()

    def stats(self) -> EncoderStats:
        return EncoderStats(self._num_pictures, self._num_batches, self._num_waiting)

    async def encode(self, picture: PreparedImage, *, timeout_s: float) -> Embedding:
        """The picture's vectors.

        Raises:
            Overloaded: `max_queue` pictures are waiting already.
            DeadlineExceeded: `timeout_s` passed first; the picture is dropped if it has not begun.
            ReplicaLost: the encoder has been stopped.
            OmniError: the tower failed on this picture.
        """
        if self._num_waiting >= self._config.max_queue:
            raise Overloaded("The vision pool is at capacity.", retry_after=1.0)
        if not self.is_healthy:
            raise ReplicaLost("The vision replica has stopped.")
        loop = asyncio.get_running_loop()
        job = _Job(picture, loop.create_future(), loop, time.monotonic())
        self._num_waiting += 1
        self._inbox.put(job)
        try:
            async with asyncio.timeout(timeout_s):
                return await job.result
        except TimeoutError:
            raise DeadlineExceeded("The picture could not be encoded in time.") from None
        finally:
            self._num_waiting -= 1

    def stop(self) -> None:
        """Refuse what comes from now on, finish what waits, and join the thread."""
        if self._thread is None:
            return
        self._stopping = True
        self._inbox.put(None)
        self._thread.join()
        self._thread = None

    # -- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._take_batch()) is not None:
            self._encode(batch)

    def _take_batch(self) -> list[_Job] | None:
        """Wait until there is a picture to encode, and take the oldest; None means stop."""
        while True:
            self._read_inbox()
            self._backlog = deque(job for job in self._backlog if not job.result.cancelled())
            if self._backlog:
                return [self._backlog.popleft() for _ in range(self._sizes.choose(len(self._backlog)))]
            if self._has_met_stop:
                return None

    def _read_inbox(self) -> None:
        """Move everything to the backlog, waiting for the first if that is empty."""
        try:
            while True:
                job = self._inbox.get(block=not self._backlog and not self._has_met_stop)
                if job is None:
                    self._has_met_stop = True
                else:
                    self._backlog.append(job)
        except queue.Empty:
            return

    def _encode(self, batch: list[_Job]) -> None:
        begun = time.monotonic()
        results: Sequence[Embedding | OmniError]
        try:
            results = self._encoder.encode([job.picture for job in batch])
        except Exception:
            logger.exception("a batch of %d pictures failed; trying them one by one", len(batch))
            results = [self._encode_alone(job) for job in batch]
        seconds = time.monotonic() - begun
        self._num_batches += 1
        self._num_pictures += len(batch)
        self._sizes.note(len(batch), seconds)
        self._observer.emit(BatchEncoded(len(batch), seconds, begun - batch[0].arrived))
        for job, result in zip(batch, results, strict=True):
            _answer(job, result)

    def _encode_alone(self, job: _Job) -> Embedding | OmniError:
        try:
            return self._encoder.encode([job.picture])[0]
        except Exception:
            logger.exception("a picture failed by itself")
            return OmniError("the vision tower failed on a picture")


def _answer(job: _Job, result: Embedding | OmniError) -> None:
    def deliver() -> None:
        if job.result.done():
            return
        if isinstance(result, OmniError):
            job.result.set_exception(result)
        else:
            job.result.set_result(result)

    job.loop.call_soon_threadsafe(deliver)
