"""One system in a process of its own, without HTTP: our engine loop, or transformers' generate.

Reads one JSON object a line from stdin ({"prompts": [[text, ids], ...], "concurrency": n}) and answers each with a
measurement. Not run by hand; `engine.py` starts it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_prompts import BenchPrompt, PromptMaker
from bench_results import Measurement, closed_loop

from omnilmm.config import EngineConfig
from omnilmm.messages import Embedding, GenerateCall, Prompt, Sampling
from omnilmm.models.config import read_model_config
from omnilmm.models.packed import WeightDtype, load_for_decoding
from omnilmm.models.weights import torch_dtype
from omnilmm.observe import Silent
from omnilmm.pipeline import start_engine


class EngineSystem:
    """Our engine loop, fed with ids. Has the settings `omnilmm serve` has by default."""

    def __init__(
        self, folder: Path, dtype: str, num_tokens: int, *, num_blocks: int, weight_dtype: WeightDtype | None = None
    ) -> None:
        config = read_model_config(folder)
        model = load_for_decoding(folder, config, dtype=dtype, weight_dtype=weight_dtype)
        engine = EngineConfig(num_blocks=num_blocks)
        room = min(config.max_context, engine.num_blocks * engine.block_size)
        self._loop = start_engine(model, engine.resolve(max_context=room), Silent(), owns_cores=True)
        self._num_tokens = num_tokens
        self._maker = PromptMaker(folder, num_tokens=0)
        self._event_loop = asyncio.new_event_loop()

    def measure(self, prompts: list[BenchPrompt], concurrency: int) -> Measurement:
        work = closed_loop(self._stream, prompts, concurrency=concurrency, num_tokens=self._num_tokens)
        return self._event_loop.run_until_complete(work)

    async def _stream(self, prompt: BenchPrompt) -> AsyncIterator[tuple[int, str]]:
        sampling = Sampling(max_tokens=self._num_tokens)
        call = GenerateCall("bench", Prompt(prompt.ids, (), ()), (), sampling)
        ids: list[int] = []
        async for batch in self._loop.generate(call, fetch=_no_vectors):
            ids += batch.ids
            yield len(ids), self._maker.text_of(batch.ids)

    def close(self) -> None:
        self._loop.stop()
        self._event_loop.close()


async def _no_vectors(key: str) -> Embedding | None:
    return None


class GenerateSystem:
    """transformers' generate over static batches, every prompt of a batch known in advance."""

    def __init__(self, folder: Path, dtype: str, num_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(dtype)).eval()
        self._model.generation_config.eos_token_id = None  # the end token is a token like any other
        self._num_tokens = num_tokens
        self._maker = PromptMaker(folder, num_tokens=0)

    @torch.inference_mode()
    def measure(self, prompts: list[BenchPrompt], concurrency: int) -> Measurement:
        begun = time.perf_counter()
        answers = [
            self._generate([prompt.ids for prompt in prompts[at : at + concurrency]])
            for at in range(0, len(prompts), concurrency)
        ]
        seconds = time.perf_counter() - begun
        texts = [self._maker.text_of(ids) for batch in answers for ids in batch]
        return Measurement(len(prompts) * self._num_tokens / seconds, None, None, tuple(texts))

    def _generate(self, rows: list[tuple[int, ...]]) -> list[list[int]]:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        whole = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=self._num_tokens, do_sample=False, pad_token_id=0
        )
        return [row[width:].tolist() for row in whole]

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=["engine", "engine-int8", "generate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--blocks", type=int, default=EngineConfig().num_blocks)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kinds: dict[str, Any] = {
        "engine": partial(EngineSystem, num_blocks=args.blocks),
        "engine-int8": partial(EngineSystem, num_blocks=args.blocks, weight_dtype="int8"),
        "generate": GenerateSystem,
    }
    system = kinds[args.system](args.folder, args.dtype, args.tokens)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [BenchPrompt(text, tuple(ids)) for text, ids in asked["prompts"]]
        print(json.dumps(system.measure(prompts, asked["concurrency"]).to_json()), flush=True)
    system.close()


if __name__ == "__main__":
    main()
