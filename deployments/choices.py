"""Several answers at once, told as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from omnilmm.messages import Delta, Finished

MAX_AT_ONCE = 16
"""Answers of one request that are generated at a time; the others wait."""

Event = Delta | Finished
Begin = Callable[[], AsyncGenerator[Event, None]]


async def side_by_side(
    begin: Sequence[Begin], *, per_prompt: int, at_once: int = MAX_AT_ONCE
) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of many answers, each with the number of its answer. Closing the generator closes them all.

    `per_prompt` answers in a row are to the same prompt. The first of them goes ahead until it says something: by then
    its pictures are encoded and its prompt is in the decoder's KV cache, where the others find them.

    Raises:
        OmniError: of the first answer to fail; the others are closed.
    """
    if len(begin) == 1:
        async with aclosing(begin[0]()) as answer:
            async for event in answer:
                yield 0, event
        return
    arrivals: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(maxsize=len(begin))
    is_known = [asyncio.Event() for _ in range(len(begin) // per_prompt)]
    room = asyncio.Semaphore(at_once)

    async def pump(index: int) -> None:
        prompt, place = divmod(index, per_prompt)
        try:
            if place:
                await is_known[prompt].wait()
            async with room, aclosing(begin[index]()) as answer:
                async for event in answer:
                    is_known[prompt].set()
                    await arrivals.put((index, event))
        except Exception as error:
            await arrivals.put((index, error))

    pumps = [asyncio.create_task(pump(index)) for index in range(len(begin))]
    try:
        unfinished = len(begin)
        while unfinished:
            index, arrival = await arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            yield index, arrival
            unfinished -= isinstance(arrival, Finished)
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
