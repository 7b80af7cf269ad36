"""What the way from the engine to the client costs: `omnilmm serve` beside the same engine in a process, in turns.

    python tests/bench/path_cost.py --model FOLDER [--dtype bfloat16] [--repeats 2] [--threads N] [--minicpm]

Output tok/s at 16 streams, time to the first token of one stream alone, and the CPU time of every process: idle, for
a request of two tokens, and per token of an answer. CPU time bears other load on the machine far better than seconds
do. The client runs on the same cores, and counts. `--threads` gives the engine fewer threads than there are cores, on
both sides alike: the way has a core of its own then, as it has where decoders run on GPUs. `--minicpm` measures random
weights of the size of OmniLMM-3B's decoder, with the tokenizer of `--model`: 15 GB of memory, ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import httpx
import psutil
from bench_prompts import BenchPrompt, PromptMaker
from bench_results import Measurement, closed_loop
from bench_servers import Server, omnilmm_server
from bench_text_model import write_text_checkpoint
from engine import NUM_PROMPT_TOKENS, NUM_TOKENS, worker

CONCURRENCY, NUM_ALONE = 16, 5
NUM_BLOCKS = 256
"""Of KV on both sides: room for 16 streams and a third more, and little memory even for the large model."""
IDLE_S = 8.0
PARTS = {
    "ServeReplica:omnilmm:decoder": "decoder",
    "ServeReplica:omnilmm:router": "router",
    "ProxyActor": "HTTP proxy",
    "ServeController": "controller",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a text checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the engine")
    parser.add_argument("--minicpm", action="store_true", help="another model: random weights, 2.6 G parameters")
    parser.add_argument("--requests", type=int, default=32, help="a measurement at 16 streams")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model, name = options.model, options.model.name
        if options.minicpm:
            model = Path(scratch) / "minicpm"
            name = write_text_checkpoint(model, like=options.model)
        maker = PromptMaker(model, num_tokens=NUM_PROMPT_TOKENS)
        with (
            omnilmm_server(
                model, options.dtype, Path(scratch), threads=options.threads, num_blocks=NUM_BLOCKS
            ) as server,
            worker("engine", model, options.dtype, options.threads, num_blocks=NUM_BLOCKS) as (_, processes, engine),
        ):
            ask(server, maker.make(CONCURRENCY, seed=1), CONCURRENCY)
            engine(maker.make(CONCURRENCY, seed=2), CONCURRENCY)
            cores = f"{options.threads} of {len(os.sched_getaffinity(0))} cores for the engine"
            print(f"{name}, {options.dtype}, {cores}, {NUM_PROMPT_TOKENS} tokens in, {NUM_TOKENS} out\n", flush=True)
            compare(server, engine, maker, options.repeats, options.requests)
            weigh(server, processes[0], engine, maker, options.requests)


def ask(server: Server, prompts: Sequence[BenchPrompt], concurrency: int, num_tokens: int = NUM_TOKENS) -> Measurement:
    async def run() -> Measurement:
        async with httpx.AsyncClient(timeout=600) as client:
            stream = partial(server.stream, client, num_tokens=num_tokens)
            return await closed_loop(stream, prompts, concurrency=concurrency, num_tokens=num_tokens)

    return asyncio.run(run())


def compare(
    server: Server, engine: Callable[..., Measurement], maker: PromptMaker, repeats: int, num_requests: int
) -> None:
    """Rates and first tokens, taking turns."""
    many: list[tuple[Measurement, Measurement]] = []
    alone: list[tuple[Measurement, Measurement]] = []
    for repeat in range(repeats):
        for runs, concurrency, count in ((many, CONCURRENCY, num_requests), (alone, 1, NUM_ALONE)):
            inside = engine(maker.make(count, seed=100 * repeat + concurrency), concurrency)
            outside = ask(server, maker.make(count, seed=10_000 + 100 * repeat + concurrency), concurrency)
            runs.append((inside, outside))
    for name, runs in ((f"{CONCURRENCY} streams", many), ("one stream", alone)):
        rates = [statistics.median(run[side].tok_s for run in runs) for side in (0, 1)]
        waits = [statistics.median(1000 * (run[side].ttft_s or 0.0) for run in runs) for side in (0, 1)]
        ratio = statistics.median(outside.tok_s / inside.tok_s for inside, outside in runs)
        print(f"{name:12} engine {rates[0]:6.1f} tok/s   server {rates[1]:6.1f} tok/s   ratio {ratio:.2f}")
        print(
            f"{'':12} engine {waits[0]:6.1f} ms TTFT server {waits[1]:6.1f} ms TTFT added {waits[1] - waits[0]:.1f}",
            flush=True,
        )


def weigh(
    server: Server, process: psutil.Process, engine: Callable[..., Measurement], maker: PromptMaker, num_requests: int
) -> None:
    """CPU time by process, in milliseconds."""
    prompts = maker.make(num_requests, seed=50_000)
    idle = cpu_of(server, lambda: time.sleep(IDLE_S), 1 / IDLE_S)
    short = cpu_of(server, lambda: ask(server, prompts, CONCURRENCY, 2), 1 / len(prompts))
    prompts = maker.make(num_requests, seed=60_000)
    per_token = 1 / (len(prompts) * NUM_TOKENS)
    long = cpu_of(server, lambda: ask(server, prompts, CONCURRENCY), per_token)
    before = sum(process.cpu_times()[:2])
    engine(maker.make(num_requests, seed=70_000), CONCURRENCY)
    long["engine alone"] = 1000 * (sum(process.cpu_times()[:2]) - before) * per_token
    print(f"\n{'CPU time in ms':16}{'a second, idle':>16}{'a short request':>17}{'a token':>10}")
    for name in sorted(long, key=lambda name: -long[name]):
        print(f"{name:16}{idle[name]:16.1f}{short[name]:17.1f}{long[name]:10.3f}")


def cpu_of(server: Server, work: Callable[[], object], per: float) -> Counter[str]:
    """What each part of the server, and this process as its client, took for the work, in ms times `per`."""
    before = cpu_times(server)
    work()
    after = cpu_times(server)
    return Counter({name: 1000 * (after[name] - before[name]) * per for name in after})


def cpu_times(server: Server) -> Counter[str]:
    seconds: Counter[str] = Counter()
    for process in (*server.processes(), psutil.Process()):
        try:
            name = "client" if process.pid == os.getpid() else part_of(process.cmdline())
            seconds[name] += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return seconds


def part_of(command: Sequence[str]) -> str:
    words = " ".join(command)
    return next((name for mark, name in PARTS.items() if mark in words), "rest of Ray")


if __name__ == "__main__":
    main()
