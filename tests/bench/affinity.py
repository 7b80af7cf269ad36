"""Affinity over a live cluster: 60 conversations of 5 turns on three decoder replicas, and on one.

    python tests/bench/affinity.py [--checkpoint FOLDER] [--clients 12]

Serves a small checkpoint three times: with one decoder replica (all there is to find, is found), with three and our
routing, and with three and Ray Serve's own routing by power of two choices. Prints the share of prompt tokens found in
KV, and the time to the first token. The same on paper, where only routing counts: tests/deployments/
test_affinity_simulation.py.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml
from bench_servers import Server
from multiturn import free_port

from cluster.local import RAY_ENVIRONMENT

TINY = Path(__file__).parents[1] / "data" / "minicpm-v-tiny"
NUM_CHATS, NUM_TURNS, NUM_TOKENS = 60, 5, 24
POWER_OF_TWO = "ray.serve._private.request_router.pow_2_router:PowerOfTwoChoicesRequestRouter"
START = "import deployments.app as app; app.AFFINITY = {router!r}; from cluster.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Asked:
    turn: int
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=TINY)
    parser.add_argument("--clients", type=int, default=12)
    options = parser.parse_args()
    print(f"{NUM_CHATS} chats of {NUM_TURNS} turns, {options.clients} at a time, {options.checkpoint.name}\n")
    print(f"{'':26}{'prefix tokens found':>20}{'TTFT p50':>10}{'p90':>8}{'p99':>8}")
    alone = None
    for name, num_replicas, router in (
        ("one replica", 1, "deployments.affinity:AffinityRouter"),
        ("three, by affinity", 3, "deployments.affinity:AffinityRouter"),
        ("three, power of two", 3, POWER_OF_TWO),
    ):
        asked = measure(options, num_replicas, router)
        share = sum(one.cached_tokens for one in asked) / sum(one.prompt_tokens for one in asked)
        alone = alone or share
        ordered = sorted(1000 * one.ttft_s for one in asked)
        waits = "".join(f"{ordered[int(part * len(ordered))]:8.0f}" for part in (0.5, 0.9, 0.99))
        print(f"{name:26}{share:12.1%} {share / alone:6.2f}x  {waits} ms", flush=True)


def measure(options: argparse.Namespace, num_replicas: int, router: str) -> list[Asked]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        start(options, num_replicas, router, folder) as server,
        ThreadPoolExecutor(options.clients) as pool,
    ):
        list(pool.map(lambda _: hold_chat(server, NUM_TURNS), range(options.clients)))  # first use of everything
        held = list(pool.map(lambda _: hold_chat(server, NUM_TURNS), range(NUM_CHATS)))
    return [one for chat in held for one in chat]


def start(options: argparse.Namespace, num_replicas: int, router: str, folder: str) -> Server:
    port, config = free_port(), Path(folder) / "serve_config.yaml"
    pool = {"autoscaling": {"min_replicas": num_replicas, "max_replicas": num_replicas}, "torch_threads": 1}
    model = {"name": "bench", "path": str(options.checkpoint), "dtype": "float32", "decoder": pool}
    application = {"import_path": "deployments.app:build", "args": {"models": [model], "cache": {"redis": "none"}}}
    config.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
    command = [sys.executable, "-c", START.format(router=router), "serve", "--config", str(config)]
    command += ["--port", str(port)]
    # Ray reads its environment when it is imported, which START does before the command could set it
    return Server(command, port=port, ready_path="/ready", log=Path(folder) / "log", env=RAY_ENVIRONMENT, key=None)


def hold_chat(server: Server, num_turns: int) -> list[Asked]:
    """One conversation with words of its own, turn after turn."""
    messages = [{"role": "user", "content": f"{secrets.token_hex(80)} Tell me about it."}]
    asked = []
    for turn in range(1, num_turns + 1):
        one, answer = ask(server, turn, messages)
        asked.append(one)
        messages += [
            {"role": "assistant", "content": answer or "."},
            {"role": "user", "content": f"{secrets.token_hex(10)} And then?"},
        ]
    return asked


def ask(server: Server, turn: int, messages: list[dict]) -> tuple[Asked, str]:
    body = {"model": "bench", "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    begun, first, pieces, usage = time.perf_counter(), None, [], {}
    with httpx.stream("POST", f"{server.base}/v1/chat/completions", json=body, timeout=120) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
    assert first is not None
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Asked(turn, first - begun, usage["prompt_tokens"], cached), "".join(pieces)


if __name__ == "__main__":
    main()
