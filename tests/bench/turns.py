"""What the cache and the KV prefix save: time to the first token of turn 1 and of the turns after it, in one run.

    python tests/bench/turns.py [--model NAME=PATH] [--chats 20] [--turns 5] [--dtype float32]

Starts `omnilmm serve` on a free port, holds chats about distinct pictures one after the other, and prints start-up
seconds and TTFT (client's side, over HTTP, streaming) side by side. Then the same with Redis stopped (SIGSTOP), so
that the price of a dead cache shows beside the living one.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image

from deployments.redis_server import RedisServer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="NAME=PATH; the built-in tiny model if not given")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with RedisServer() as redis, serving(options, redis.url) as (url, seconds):
        print(f"start-up: {seconds:.1f} s until ready")
        chat(url, options.turns)  # not counted: first use of everything
        alive = [chat(url, options.turns) for _ in range(options.chats)]
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            hung = [chat(url, options.turns) for _ in range(options.chats)]
        finally:
            os.kill(redis.pid, signal.SIGCONT)
    print(f"{options.chats} chats of {options.turns} turns, each about a picture of its own; TTFT in ms")
    print(f"{'':24}{'p50':>8}{'p90':>8}{'max':>8}")
    for name, runs in (("", alive), (", Redis hung", hung)):
        row(f"turn 1{name}", [run[0] for run in runs])
        row(f"turns 2+{name}", [ttft for run in runs for ttft in run[1:]])
    first, later = (statistics.median(x) for x in ([r[0] for r in alive], [t for r in alive for t in r[1:]]))
    dead = statistics.median([r[0] for r in hung])
    print(
        f"turns 2+ / turn 1: {later / first:.2f}    turn 1, Redis hung, beyond turn 1: {(dead - first) * 1000:+.0f} ms"
    )


def row(name: str, seconds: list[float]) -> None:
    ordered = sorted(1000 * s for s in seconds)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * len(ordered)))]
    print(f"{name:24}{statistics.median(ordered):8.1f}{p90:8.1f}{ordered[-1]:8.1f}")


@contextmanager
def serving(options: argparse.Namespace, redis_url: str) -> Iterator[tuple[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("omnilmm"), "serve", "--port", str(port), "--dtype", options.dtype]
    command += ["--redis", redis_url, *(["--model", options.model] if options.model else [])]
    environment = os.environ | {"OMNILMM_CACHE_SECRET": secrets.token_hex(32), "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if re.search(r"\bready\b at http", line):
                break
        else:
            raise SystemExit("the server did not start")
        seconds = time.monotonic() - begun
        for line in server.stdout:
            if "Ctrl-C stops" in line:
                break
        yield f"http://127.0.0.1:{port}", seconds
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def chat(url: str, turns: int) -> list[float]:
    """One chat about a picture nobody has seen; seconds to the first token of each turn."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    messages: list[dict] = [{"role": "user", "content": [picture(), {"type": "text", "text": "What is this?"}]}]
    ttfts = []
    with httpx.Client(timeout=120) as client:
        for _ in range(turns):
            ttft, answer = ask(client, url, {"model": model, "messages": messages})
            ttfts.append(ttft)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And what else?"}]
    return ttfts


def ask(client: httpx.Client, url: str, body: dict) -> tuple[float, str]:
    body = body | {"stream": True, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    begun, ttft, pieces = time.monotonic(), None, []
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(response.read().decode())
        for line in response.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"].get("content")
                if delta and ttft is None:
                    ttft = time.monotonic() - begun
                pieces.append(delta or "")
    assert ttft is not None
    return ttft, "".join(pieces)


def picture() -> dict:
    noise = Image.frombytes("RGB", (64, 48), secrets.token_bytes(64 * 48 * 3)).resize((640, 480))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


if __name__ == "__main__":
    main()
