"""What a batch loses on the way to the engine, and what it gains over asking one by one:

    python tests/bench/batch.py FOLDER

Three ways to have the same kind of lines answered (about 128 tokens in, 32 out, greedy, end token ignored), on one
loaded model, in turns, medians over --repeats; tokens written per second:

    engine   the engine loop itself, fed with ids, as many calls at a time as the batch has: its own maximum
    batch    what `omnilmm batch run` does: lines read, checked, answered by the flow, written to the journal
    naive    one line after the other through the same checks and flow, without even the HTTP a client would add

No line is asked twice, so no prefix cache helps anyone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_prompts import BenchPrompt, PromptMaker

from cluster.batch import QUEUE_RATIO
from cluster.batch_service import LocalService, Tally
from omnilmm.batch.locations import OnDisk
from omnilmm.batch.offline import Progress, answer_rows, write_output
from omnilmm.batch.sources import Asking, read_rows
from omnilmm.config import EngineConfig
from omnilmm.messages import Embedding, GenerateCall, Prompt, Sampling
from omnilmm.pipeline import Pipeline

MODEL = "bench"


class Bench:
    def __init__(self, pipeline: Pipeline, folder: Path, args: argparse.Namespace) -> None:
        self._pipeline, self._args = pipeline, args
        self._maker = PromptMaker(folder, num_tokens=128)
        self._max_running = int(args.concurrency * QUEUE_RATIO)
        self._num_made = 0

    def prompts(self, count: int) -> list[BenchPrompt]:
        self._num_made += 1
        return self._maker.make(count, seed=self._num_made)

    async def engine(self) -> float:
        waiting = iter(self.prompts(self._args.lines))
        num_tokens = 0

        async def work() -> None:
            nonlocal num_tokens
            for prompt in waiting:
                sampling = Sampling(max_tokens=self._args.tokens)
                call = GenerateCall("bench", Prompt(prompt.ids, (), ()), (), sampling)
                async for batch in self._pipeline.engine.generate(call, fetch=no_vectors):
                    num_tokens += len(batch.ids)

        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._max_running):
                group.create_task(work())
        return num_tokens / (time.perf_counter() - begun)

    async def batch(self, scratch: Path) -> float:
        source, output = self._write_lines(scratch, self._args.lines), scratch / "out.jsonl"
        service = LocalService.over(self._pipeline, MODEL)
        begun = time.perf_counter()
        rows = read_rows(OnDisk(source), Asking(MODEL))
        progress, tally = Progress(scratch / "out.jsonl.progress", "bench"), Tally()
        await answer_rows(rows, service.ask, progress, max_running=self._max_running, tell=tally.add)
        write_output(OnDisk(output), rows, progress, is_table=False)
        seconds = time.perf_counter() - begun
        progress.remove()
        output.unlink()
        if tally.failed or tally.completion_tokens != self._args.lines * self._args.tokens:
            raise RuntimeError(f"{tally.failed} lines failed, {tally.completion_tokens} tokens were written")
        return tally.completion_tokens / seconds

    async def naive(self, scratch: Path) -> float:
        rows = read_rows(OnDisk(self._write_lines(scratch, self._args.naive_lines)), Asking(MODEL))
        service = LocalService.over(self._pipeline, MODEL)
        begun = time.perf_counter()
        num_tokens = 0
        for row in rows:
            answer = await service.ask(row.endpoint, row.body(), f"naive-{row.number}")
            num_tokens += answer["usage"]["completion_tokens"]
        return num_tokens / (time.perf_counter() - begun)

    def _write_lines(self, scratch: Path, count: int) -> Path:
        path = scratch / "lines.jsonl"
        with path.open("w") as file:
            for number, prompt in enumerate(self.prompts(count)):
                body = {"model": MODEL, "messages": [{"role": "user", "content": prompt.text}], "temperature": 0}
                body |= {"max_tokens": self._args.tokens, "ignore_eos": True}
                line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        return path


async def no_vectors(key: str) -> Embedding | None:
    return None


async def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    engine = EngineConfig(num_blocks=2048, max_sequences=args.concurrency, max_waiting=4 * args.concurrency)
    runs: dict[str, list[float]] = {"engine": [], "batch": [], "naive": []}
    with tempfile.TemporaryDirectory() as scratch:
        async with Pipeline.load(str(args.model), name=MODEL, dtype=args.dtype, engine=engine) as pipeline:
            bench = Bench(pipeline, args.model, args)
            for repeat in range(args.repeats + 1):
                told = {
                    "engine": await bench.engine(),
                    "batch": await bench.batch(Path(scratch)),
                    "naive": await bench.naive(Path(scratch)),
                }
                if repeat:  # the first round warms everything up
                    for name, speed in told.items():
                        runs[name].append(speed)
    return runs


def report(args: argparse.Namespace, runs: dict[str, Sequence[float]]) -> str:
    median = {name: statistics.median(speeds) for name, speeds in runs.items()}
    rows = [f"| {name} | {median[name]:.1f} | {min(speeds):.1f} | {max(speeds):.1f} |" for name, speeds in runs.items()]
    return "\n".join(
        (
            f"machine      {torch.get_num_threads()} threads, {platform.system()}, torch {torch.__version__}",
            f"checkpoint   {args.model.name}, {args.dtype}",
            f"lines        {args.lines} of 128 tokens in and {args.tokens} out, {args.concurrency} decoded at a time, "
            f"{args.repeats} repeats ({args.naive_lines} lines one by one)",
            "",
            "| output tok/s | median | least | most |",
            "|---|---|---|---|",
            *rows,
            "",
            f"batch / engine  {median['batch'] / median['engine']:.3f}",
            f"batch / naive   {median['batch'] / median['naive']:.2f}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lines", type=int, default=48)
    parser.add_argument("--naive-lines", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(report(args, asyncio.run(measure(args))))


if __name__ == "__main__":
    main()
