"""The reader's end of a sequence: tokens gather here until somebody pulls them.

A hop through the cluster costs the same for one token as for sixteen, so batches are as large as the reader's own pace
makes them: the first token leaves at once, and afterwards a pull takes all that gathered since the last one, after
waiting until a flush interval has passed since then or `max_batch_tokens` are there. The more streams there are, the
longer the interval.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from omnilmm.messages import TokenBatch

Ending = TokenBatch | Exception
"""The last thing a reader gets when a stream does not end by itself: a batch with `missing`, or something raised."""

HOP_EVERY_S = 0.0125
"""Between two batches of a replica, whosever they are. Each costs the processes on its way about a millisecond of CPU,
which the engine's steps pay for where they share the cores."""
MAX_FLUSH_INTERVAL_S = 0.2
"""A reader who watches is told this often at least."""


def flush_interval(num_streams: int, *, least_s: float) -> float:
    """How long tokens of one of this many streams may gather, in seconds."""
    return min(max(least_s, HOP_EVERY_S * num_streams), max(least_s, MAX_FLUSH_INTERVAL_S))


class TokenStream:
    """One sequence's tokens on their way to one reader. Lives, and is touched, on the event loop that made it."""

    def __init__(self, *, flush_interval_s: Callable[[], float], max_batch_tokens: int) -> None:
        self.event_loop = asyncio.get_running_loop()
        self._flush_interval_s = flush_interval_s
        self._max_batch_tokens = max_batch_tokens
        self._gathered: list[TokenBatch] = []
        self._num_gathered = 0  # tokens
        self._ending: Ending | None = None
        self.has_ended = False
        self._taken_at: float | None = None
        self._num_wanted = 1  # what the reader waits for
        self._wake = asyncio.Event()

    def push(self, batch: TokenBatch) -> None:
        """Add tokens; a batch with `finish` is the last. Nothing is added after the end."""
        if self.has_ended:
            return
        self._gathered.append(batch)
        self._num_gathered += len(batch.ids)
        self.has_ended = batch.finish is not None
        if self.has_ended or self._num_gathered >= self._num_wanted:
            self._wake.set()

    def end(self, ending: Ending) -> None:
        """End early: the reader gets what has gathered, then `ending`. Only the first end counts."""
        if not self.has_ended:
            self.has_ended, self._ending = True, ending
            self._wake.set()

    async def take(self) -> TokenBatch | None:
        """What has gathered, as one batch; None after the end.

        Raises:
            Exception: the one the stream was ended with.
        """
        await self._gather(1)
        if self._taken_at is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._taken_at + self._flush_interval_s()):
                    await self._gather(self._max_batch_tokens)
        self._taken_at = self.event_loop.time()
        if self._gathered:
            gathered, self._gathered, self._num_gathered = self._gathered, [], 0
            return _merge(gathered)
        ending, self._ending = self._ending, None
        if isinstance(ending, Exception):
            raise ending
        return ending

    async def _gather(self, num_tokens: int) -> None:
        """Wait for this many tokens or the end."""
        while self._num_gathered < num_tokens and not self.has_ended:
            self._num_wanted = num_tokens
            self._wake.clear()
            await self._wake.wait()


def _merge(batches: Sequence[TokenBatch]) -> TokenBatch:
    return TokenBatch(
        ids=tuple(token_id for batch in batches for token_id in batch.ids),
        logprobs=tuple(logprob for batch in batches for logprob in batch.logprobs),
        prefill=batches[0].prefill,
        finish=batches[-1].finish,
    )
