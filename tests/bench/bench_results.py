"""What one measurement gives, and the closed loop every streaming system is measured with."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench_prompts import BenchPrompt

Stream = Callable[[BenchPrompt], AsyncIterator[tuple[int, str]]]
"""Asks one question; yields (tokens so far, or 0 where a chunk does not say, and the text that came)."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run at one concurrency. `decode_tok_s` is the rate of one stream after its first token."""

    tok_s: float
    ttft_s: float | None
    decode_tok_s: float | None
    texts: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    num_tokens: int
    ttft_s: float
    decode_s: float


async def closed_loop(
    stream: Stream, prompts: Sequence[BenchPrompt], *, concurrency: int, num_tokens: int
) -> Measurement:
    """`concurrency` clients, each asking its next question when its last one is answered."""
    waiting = list(enumerate(prompts))[::-1]
    answers: dict[int, _Answer] = {}

    async def client() -> None:
        while waiting:
            index, prompt = waiting.pop()
            answers[index] = await _ask(stream, prompt)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - begun
    for answer in answers.values():
        if answer.num_tokens != num_tokens:
            raise RuntimeError(f"an answer has {answer.num_tokens} tokens, not {num_tokens}")
    return Measurement(
        tok_s=len(prompts) * num_tokens / seconds,
        ttft_s=statistics.median(answer.ttft_s for answer in answers.values()),
        decode_tok_s=statistics.median((num_tokens - 1) / answer.decode_s for answer in answers.values()),
        texts=tuple(answers[index].text for index in range(len(prompts))),
    )


async def _ask(stream: Stream, prompt: BenchPrompt) -> _Answer:
    begun, first, num_tokens, pieces = time.perf_counter(), 0.0, 0, []
    async for count, text in stream(prompt):
        if not first:
            first = time.perf_counter()
        num_tokens = count or num_tokens
        pieces.append(text)
    return _Answer("".join(pieces), num_tokens, first - begun, time.perf_counter() - first)
