"""Whether a batch yields to people, and gets everything while there are none:

    python tests/bench/batch_yield.py FOLDER

A server is started as `omnilmm serve` starts it. Online requests (64 tokens in, 16 out, greedy, streamed) arrive at
fixed times, whether or not the ones before have been answered; the time from sending to the first text is noted.

    alone    nothing else runs
    beside   a batch of far more lines than can be decoded at a time runs through /v1/batches; what it gets done
             meanwhile is noted too
    batch    nobody is online: lines of the batch answered a second, by its journal, in tokens written

Then the server is stopped, and the engine alone is given the same lines in this process: its own maximum.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import httpx
import torch
from batch import Bench
from bench_prompts import PromptMaker
from bench_servers import MODEL, Server, omnilmm_server

from deployments.settings import DATABASE_VARIABLE
from omnilmm.config import EngineConfig
from omnilmm.pipeline import Pipeline

ONLINE_TOKENS = 16
WARM_S = 8.0
"""Until the batch has filled every place of the decoder, and its first prompts are read."""


async def first_texts(server: Server, maker: PromptMaker, args: argparse.Namespace, *, seed: int) -> list[float]:
    """Seconds to the first text of every online request."""
    prompts = maker.make(args.requests, seed=seed)
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:

        async def one(number: int) -> float:
            await asyncio.sleep(number / args.rate)
            begun, first = time.perf_counter(), 0.0
            async for _, text in server.stream(client, prompts[number], ONLINE_TOKENS):
                first = first or (time.perf_counter() - begun if text else 0.0)
            return first

        return list(await asyncio.gather(*(one(number) for number in range(args.requests))))


class RunningBatch:
    """A batch on the server, and its journal on our disk."""

    def __init__(self, server: Server, folder: Path, lines: bytes) -> None:
        self._client = httpx.Client(base_url=server.base, headers=server._headers, timeout=120)
        stored = self._client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", lines)})
        asked = {"input_file_id": stored.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        self._id = self._client.post("/v1/batches", json=asked).raise_for_status().json()["id"]
        self._journal = folder / "storage" / "batches" / self._id

    def num_answered(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self._journal.glob("journal.*"))

    def check_running(self) -> None:
        status = self._client.get(f"/v1/batches/{self._id}").json()["status"]
        if status != "in_progress":
            raise RuntimeError(f"the batch is {status}: give it more --lines")

    def cancel(self) -> None:
        self._client.post(f"/v1/batches/{self._id}/cancel").raise_for_status()
        self._client.close()


def batch_lines(maker: PromptMaker, args: argparse.Namespace) -> bytes:
    lines = []
    for number, prompt in enumerate(maker.make(args.lines, seed=10**6)):
        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt.text}], "temperature": 0}
        body |= {"max_tokens": args.tokens, "ignore_eos": True}
        line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line).encode() + b"\n")
    return b"".join(lines)


async def measure_server(args: argparse.Namespace) -> tuple[list[float], list[float], float, float]:
    """Seconds to first text alone and beside a batch, and the batch's tokens a second with nobody online, and then."""
    short, long = PromptMaker(args.model, num_tokens=64), PromptMaker(args.model, num_tokens=128)
    lines = batch_lines(long, args)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ[DATABASE_VARIABLE] = f"sqlite:///{scratch}/omnilmm.db"
        with omnilmm_server(args.model, args.dtype, Path(scratch)) as server:
            few = argparse.Namespace(**vars(args) | {"requests": 6})
            await first_texts(server, short, few, seed=1)
            alone = await first_texts(server, short, args, seed=2)
            batch = RunningBatch(server, Path(scratch), lines)
            await asyncio.sleep(WARM_S)
            before, begun = batch.num_answered(), time.perf_counter()
            await asyncio.sleep(args.idle_s)
            middle, met = batch.num_answered(), time.perf_counter()
            beside = await first_texts(server, short, args, seed=3)
            after, ended = batch.num_answered(), time.perf_counter()
            batch.check_running()
            batch.cancel()
    idle_rate, shared_rate = (middle - before) / (met - begun), (after - middle) / (ended - met)
    return alone, beside, idle_rate * args.tokens, shared_rate * args.tokens


async def measure_engine(args: argparse.Namespace) -> float:
    """Tokens a second of the engine alone, on lines like the batch's."""
    room = EngineConfig(max_sequences=args.concurrency, max_waiting=4 * args.concurrency)
    given = argparse.Namespace(concurrency=args.concurrency, lines=2 * args.concurrency, tokens=args.tokens)
    async with Pipeline.load(str(args.model), name=MODEL, dtype=args.dtype, engine=room) as pipeline:
        return await Bench(pipeline, args.model, given).engine()


def percentile(values: list[float], share: float) -> float:
    """The least value that so many are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(
    args: argparse.Namespace, alone: list[float], beside: list[float], rate: float, shared: float, engine: float
) -> str:
    rows = [
        f"| {name} | {1000 * percentile(v, 0.5):.0f} | {1000 * percentile(v, 0.99):.0f} | {1000 * max(v):.0f} |"
        for name, v in (("alone", alone), ("beside a batch", beside))
    ]
    return "\n".join(
        (
            f"machine      {torch.get_num_threads()} threads, {platform.system()}, torch {torch.__version__}",
            f"checkpoint   {args.model.name}, {args.dtype}",
            f"online       {args.requests} requests, {args.rate:g} a second, 64 tokens in and {ONLINE_TOKENS} out",
            f"batch        {args.lines} lines of 128 tokens in and {args.tokens} out",
            "",
            "| ms to the first text | median | p99 | most |",
            "|---|---|---|---|",
            *rows,
            "",
            f"p99 beside / alone     {percentile(beside, 0.99) / percentile(alone, 0.99):.2f}",
            f"median beside / alone  {percentile(beside, 0.5) / percentile(alone, 0.5):.2f}",
            f"batch, nobody online   {rate:.1f} tok/s",
            f"batch, beside online   {shared:.1f} tok/s",
            f"engine alone           {engine:.1f} tok/s",
            f"batch / engine         {rate / engine:.3f}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=60, help="online, in each of the two runs")
    parser.add_argument("--rate", type=float, default=2.0, help="online requests a second")
    parser.add_argument("--lines", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--idle-s", type=float, default=20.0)
    parser.add_argument("--concurrency", type=int, default=64, help="sequences the engine decodes at a time")
    args = parser.parse_args()
    alone, beside, rate, shared = asyncio.run(measure_server(args))
    print(report(args, alone, beside, rate, shared, asyncio.run(measure_engine(args))))


if __name__ == "__main__":
    main()
