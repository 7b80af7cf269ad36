"""Several answers at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from deployments.choices import side_by_side
from omnilmm.errors import Overloaded
from omnilmm.messages import Delta, Finished, FinishReason, Usage

END = Finished(FinishReason.STOP, Usage(1, 1, 0, 0))


class Speaker:
    """Answers of two words. `begun` and `closed` have the numbers of those that were; `held` stop after one word."""

    def __init__(self, held: tuple[int, ...] = (), failing: tuple[int, ...] = ()) -> None:
        self.held, self.failing = held, failing
        self.gate = asyncio.Event()
        self.begun: list[int] = []
        self.closed: list[int] = []
        self.most_open = 0

    def begin(self, count: int) -> list:
        return [lambda i=i: self.answer(i) for i in range(count)]

    async def answer(self, index: int) -> AsyncGenerator[Delta | Finished, None]:
        self.begun.append(index)
        self.most_open = max(self.most_open, len(self.begun) - len(self.closed))
        try:
            await asyncio.sleep(0)
            if index in self.failing:
                raise Overloaded("Busy.")
            yield Delta(f"{index}a")
            if index in self.held:
                await self.gate.wait()
            yield Delta(f"{index}b")
            yield END
        finally:
            self.closed.append(index)


async def collect(speaker: Speaker, count: int, per_prompt: int, **options: int) -> list:
    return [told async for told in side_by_side(speaker.begin(count), per_prompt=per_prompt, **options)]


@pytest.mark.parametrize(("count", "per_prompt"), [(1, 1), (3, 3), (4, 2), (4, 1), (40, 4)])
async def test_every_answer_is_told_in_its_order(count, per_prompt):
    speaker = Speaker()
    told = await collect(speaker, count, per_prompt)
    for index in range(count):
        assert [event for i, event in told if i == index] == [Delta(f"{index}a"), Delta(f"{index}b"), END]
    assert sorted(speaker.closed) == list(range(count))
    assert speaker.most_open <= 16


async def test_the_first_answer_to_a_prompt_goes_ahead():
    speaker = Speaker()
    stream = side_by_side(speaker.begin(4), per_prompt=2)
    index, event = await anext(stream)
    assert (index, event) in ((0, Delta("0a")), (2, Delta("2a")))
    await stream.aclose()
    assert speaker.begun[:2] == [0, 2]


async def test_a_slow_answer_does_not_hold_up_the_others():
    speaker = Speaker(held=(0,))
    told = []
    stream = side_by_side(speaker.begin(3), per_prompt=3)
    while sum(event is END for _, event in told) < 2:
        told.append(await anext(stream))
    assert [index for index, event in told if event is END] == [1, 2]
    speaker.gate.set()
    assert [event async for event in stream][-1] == (0, END)


async def test_one_failure_is_everybodys():
    speaker = Speaker(held=(0, 1), failing=(2,))
    with pytest.raises(Overloaded):
        await collect(speaker, 3, 3)
    assert sorted(speaker.closed) == [0, 1, 2]


async def test_a_first_answer_that_fails_lets_nobody_else_begin():
    speaker = Speaker(failing=(0,))
    with pytest.raises(Overloaded):
        await collect(speaker, 3, 3)
    assert speaker.begun == [0]


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_closes_all(count):
    speaker = Speaker(held=(0, 1, 2))
    stream = side_by_side(speaker.begin(count), per_prompt=count)
    for _ in range(count):
        await anext(stream)
    await stream.aclose()
    assert sorted(speaker.closed) == list(range(count))


async def test_a_slow_reader_holds_everybody_back():
    speaker = Speaker()
    stream = side_by_side(speaker.begin(20), per_prompt=1, at_once=2)
    await anext(stream)
    for _ in range(200):
        await asyncio.sleep(0)
    assert len(speaker.begun) < 20  # the queue is bounded
    assert speaker.most_open <= 2
    await stream.aclose()
