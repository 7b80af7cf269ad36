"""What turn 2 of a chat about a picture costs, in the engine: its new tokens, and nothing for the picture.

    python tests/bench/image_turns.py --model FOLDER [--dtype bfloat16] [--chats 15]

Holds chats of two turns, each about a picture of its own (64 positions of made-up vectors, so any language model will
do), through the engine loop. Time to the first token of turn 1; of turn 2; and of a prompt that is as long as what
turn 2 has to compute and has nothing in front of it. The three take turns, medians of all. Also prints what was
computed, found and fetched.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from contextlib import aclosing
from pathlib import Path

import torch

from omnilmm.config import EngineConfig
from omnilmm.engine.loop import EngineLoop
from omnilmm.messages import Embedding, GenerateCall, ImageInput, Prefill, Prompt, Sampling, Span
from omnilmm.models.config import read_model_config
from omnilmm.models.weights import load_language_model
from omnilmm.observe import Silent
from omnilmm.pipeline import start_engine

PICTURE = 64  # positions
QUESTION, ANSWER, NEXT_QUESTION = 48, 32, 40  # tokens
FIRST_ID, LAST_ID = 1000, 9000  # ordinary words, in all our vocabularies


class Bench:
    def __init__(self, loop: EngineLoop, hidden: int) -> None:
        self.loop = loop
        self.num_fetches = 0
        self._hidden = hidden
        self._draw = random.Random(1)

    def ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(FIRST_ID, LAST_ID) for _ in range(count))

    async def fetch(self, key: str) -> Embedding | None:
        self.num_fetches += 1
        generator = torch.Generator().manual_seed(int(key))
        vectors = torch.randn(PICTURE, self._hidden, generator=generator) * 0.1
        return Embedding("float32", (PICTURE, self._hidden), vectors.numpy().tobytes())

    async def ask(self, ids: tuple[int, ...], key: str | None) -> tuple[float, tuple[int, ...], Prefill]:
        """Seconds to the first token, the answer, and how the prompt was paid for."""
        images = () if key is None else (ImageInput(key, 1, PICTURE),)
        spans = tuple(Span(image.start, image.length, 0) for image in images)
        call = GenerateCall("bench", Prompt(ids, spans, ()), images, Sampling(ANSWER))
        begun, first, answer, prefill = time.perf_counter(), None, [], None
        async with aclosing(self.loop.generate(call, fetch=self.fetch)) as batches:
            async for batch in batches:
                first = first or time.perf_counter() - begun
                prefill = prefill or batch.prefill
                answer += batch.ids
        assert first is not None
        assert prefill is not None
        return first, tuple(answer), prefill


async def run(bench: Bench, num_chats: int) -> None:
    seconds: dict[str, list[float]] = {"turn 1": [], "turn 2": [], "its new tokens alone": []}
    num_new = num_found = num_fetched = 0
    for chat in range(num_chats + 1):
        key = str(chat)
        opening = (1, *(3,) * PICTURE, *bench.ids(QUESTION))
        one, answer, _ = await bench.ask(opening, key)
        before = bench.num_fetches
        two, _, prefill = await bench.ask((*opening, *answer, *bench.ids(NEXT_QUESTION)), key)
        num_fetched += bench.num_fetches - before
        num_found += len(prefill.kv_images)
        num_new = prefill.num_prompt_tokens - prefill.num_cached_tokens
        alone, _, _ = await bench.ask(bench.ids(num_new), None)
        if chat:  # the first is not counted
            for name, value in zip(seconds, (one, two, alone), strict=True):
                seconds[name].append(value)
    print(f"turn 2 has {NEXT_QUESTION} new tokens behind {1 + PICTURE + QUESTION + ANSWER}; computed for it: {num_new}")
    print(f"pictures found in KV: {num_found} of {num_chats + 1}; vectors asked for in turn 2: {num_fetched}")
    for name, values in seconds.items():
        print(f"{name:22}{1000 * statistics.median(values):9.1f} ms to the first token")
    two, alone = (statistics.median(seconds[name]) for name in ("turn 2", "its new tokens alone"))
    print(f"turn 2 / its new tokens alone: {two / alone:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint of any family")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--chats", type=int, default=15)
    options = parser.parse_args()
    config = read_model_config(options.model)
    model = load_language_model(options.model, config, dtype=options.dtype)
    loop = start_engine(model, EngineConfig(max_context=min(config.max_context, 2048)), Silent())
    try:
        asyncio.run(run(Bench(loop, config.language.hidden), options.chats))
    finally:
        loop.stop()


if __name__ == "__main__":
    main()
