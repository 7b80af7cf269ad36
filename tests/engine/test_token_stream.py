"""Tokens on their way to a reader, on a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from omnilmm.engine.stream import MAX_FLUSH_INTERVAL_S, TokenStream, flush_interval
from omnilmm.errors import OmniError
from omnilmm.messages import FinishReason, Prefill, TokenBatch, TokenLogprob

PREFILL = Prefill(5, 0, (), 0.0)


@pytest.fixture
async def stream() -> TokenStream:
    """A stream that never flushes by time: what it gives, it gives for another reason."""
    return TokenStream(flush_interval_s=lambda: 1e6, max_batch_tokens=4)


def push(stream: TokenStream, *ids: int, finish: FinishReason | None = None) -> None:
    for token_id in ids:
        is_last = token_id == ids[-1]
        stream.push(TokenBatch(ids=(token_id,), finish=finish if is_last else None))


async def test_the_first_token_leaves_at_once(stream):
    reader = asyncio.ensure_future(stream.take())
    await asyncio.sleep(0)
    assert not reader.done()
    stream.push(TokenBatch(ids=(7,), prefill=PREFILL))
    assert await reader == TokenBatch(ids=(7,), prefill=PREFILL)


async def test_a_late_reader_gets_all_that_gathered(stream):
    push(stream, 1, 2, 3, 4, 5, 6)
    assert (await stream.take()).ids == (1, 2, 3, 4, 5, 6)


async def test_later_batches_wait_until_they_are_full(stream):
    push(stream, 1)
    await stream.take()
    reader = asyncio.ensure_future(stream.take())
    push(stream, 2, 3, 4)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reader.done()
    push(stream, 5)
    assert (await reader).ids == (2, 3, 4, 5)


async def test_later_batches_wait_no_longer_than_the_interval():
    stream = TokenStream(flush_interval_s=lambda: 0.01, max_batch_tokens=1000)
    push(stream, 1)
    await stream.take()
    push(stream, 2)
    async with asyncio.timeout(10):
        assert (await stream.take()).ids == (2,)


async def test_a_reader_slower_than_the_interval_never_waits():
    stream = TokenStream(flush_interval_s=lambda: 0.0, max_batch_tokens=1000)
    for token_id in range(3):
        push(stream, token_id)
        assert (await stream.take()).ids == (token_id,)


async def test_the_end_is_told_at_once_and_once(stream):
    push(stream, 1)
    await stream.take()
    reader = asyncio.ensure_future(stream.take())
    push(stream, 2, finish=FinishReason.STOP)
    assert await reader == TokenBatch(ids=(2,), finish=FinishReason.STOP)
    assert stream.has_ended
    push(stream, 3)
    assert await stream.take() is None


async def test_logprobs_stay_with_their_tokens(stream):
    logprobs = [TokenLogprob(-float(n), ()) for n in range(3)]
    for n in range(3):
        stream.push(TokenBatch(ids=(n,), logprobs=(logprobs[n],)))
    assert (await stream.take()).logprobs == tuple(logprobs)


async def test_what_gathered_comes_before_the_error(stream):
    push(stream, 1, 2)
    stream.end(OmniError("first"))
    stream.end(OmniError("second"))
    assert (await stream.take()).ids == (1, 2)
    with pytest.raises(OmniError, match="first"):
        await stream.take()


async def test_missing_keys_come_alone_and_last(stream):
    push(stream, 1)
    stream.end(TokenBatch(missing=("a",)))
    assert await stream.take() == TokenBatch(ids=(1,))
    assert await stream.take() == TokenBatch(missing=("a",))
    assert await stream.take() is None


async def test_an_end_after_the_end_changes_nothing(stream):
    push(stream, 1, finish=FinishReason.LENGTH)
    stream.end(OmniError("late"))
    assert (await stream.take()).finish is FinishReason.LENGTH
    assert await stream.take() is None


def test_in_company_a_stream_is_told_less_often_but_often_enough():
    assert flush_interval(1, least_s=0.03) == 0.03
    assert 0.03 < flush_interval(8, least_s=0.03) < flush_interval(12, least_s=0.03) < MAX_FLUSH_INTERVAL_S
    assert flush_interval(1000, least_s=0.03) == MAX_FLUSH_INTERVAL_S
    assert flush_interval(1000, least_s=0.5) == 0.5
