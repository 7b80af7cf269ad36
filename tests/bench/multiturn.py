"""What turns about pictures cost: `make bench-multiturn`. One machine, the same weights, pictures and questions.

    ours         `omnilmm serve` with Redis
    cache-off    the same without the embedding cache: every turn encodes its pictures, KV prefixes are kept
    monolith     the original chat.py behind HTTP (tests/bench/monolith.py): no cache at all, one request at a time

Each system, one after the other, holds chats about distinct pictures (`--clients` of them at a time), is restarted and
asked one more question in each chat, answers questions of which four in five are about pictures it has met, and, but
for the monolith, holds the chats again with two replicas in each pool. Time to the first token is the client's,
over HTTP. An encode is counted where the system itself says that it made one.

    python tests/bench/multiturn.py [--only SYSTEM] [--results FOLDER] [--chart docs/bench-multiturn.png]

`--only` measures one system (or nothing) and keeps its figures in FOLDER beside those of earlier runs, so that a shared
machine is not held for long. The table and the chart are made of all that is there.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import yaml
from bench_servers import Server
from bench_vision_model import write_checkpoint
from PIL import Image

from deployments.redis_server import RedisServer

SYSTEMS = ("ours", "cache-off", "monolith")
QUESTIONS = ("What is this?", "And what else is there?", "Where is it?", "Why is that?", "What would you call it?")
NUM_TOKENS = 16
MODEL = "bench"


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and its answer's first token. `part`: "chats", "restarted", "repeats" or "two-replicas"."""

    part: str
    turn: int
    ttft_s: float
    num_encodes: int


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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        results = options.results or Path(scratch) / "results"
        results.mkdir(parents=True, exist_ok=True)
        checkpoint = results / "checkpoint"
        if not (checkpoint / "model.safetensors").exists():
            (results / "checkpoint.txt").write_text(write_checkpoint(checkpoint), encoding="utf-8")
        for system in [one for one in SYSTEMS if options.only in (one, None)]:
            asked = measure(system, checkpoint, options, Path(scratch))
            (results / f"{system}.json").write_text(json.dumps([asdict(one) for one in asked]), encoding="utf-8")
        print((results / "checkpoint.txt").read_text(encoding="utf-8"))
        print(f"{options.chats} chats of {options.turns} turns, {options.clients} at a time")
        figures = {path.stem: read(path) for path in sorted(results.glob("*.json"), key=by_system)}
        print_table(figures)
        if options.chart:
            draw_chart(figures, options.chart)


# -- measuring ----------------------------------------------------------------------------------------


def measure(system: str, checkpoint: Path, options: argparse.Namespace, scratch: Path) -> list[Asked]:
    """Everything about one system."""
    asked: list[Asked] = []
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer()) if system == "ours" else None
        start = starter(system, checkpoint, options.dtype, redis, scratch)
        chats = [Chat.about(picture(number)) for number in range(options.chats)]
        with start(1) as server:
            warm_up(server)
            asked += hold_chats(server, "chats", chats, options)
        with start(1) as server:  # whatever a process remembered is gone
            warm_up(server)
            asked += in_parallel(lambda chat: ask(server, "restarted", options.turns + 1, chat), chats, options.clients)
            asked += in_parallel(lambda chat: ask(server, "repeats", 1, chat), repeated(options.chats), options.clients)
        if system != "monolith":
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
        num_encodes = sum(image["source"] == "encoded" for image in usage["images"])
    else:
        num_encodes = sum(isinstance(message["content"], list) for message in body["messages"])
    return Asked(part, turn, (first or time.perf_counter()) - begun, num_encodes)


def picture(number: int) -> str:
    """A photograph-like JPEG of 640 x 480 that no other number gives, as a data URI."""
    noise = Image.frombytes("RGB", (64, 48), random.Random(number).randbytes(64 * 48 * 3)).resize((640, 480))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- the systems --------------------------------------------------------------------------------------


def starter(
    system: str, checkpoint: Path, dtype: str, redis: RedisServer | None, scratch: Path
) -> Callable[[int], contextlib.AbstractContextManager[Server]]:
    """What starts a system with so many replicas in each pool."""
    log = scratch / f"{system}.log"

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

    return start_monolith if system == "monolith" else start_ours


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- telling ------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Asked], bool]] = {
    "turn 1": lambda one: one.part == "chats" and one.turn == 1,
    "turns 2+": lambda one: one.part == "chats" and one.turn > 1,
    "after a restart": lambda one: one.part == "restarted",
    "80 % known pictures": lambda one: one.part == "repeats",
    "two replicas, turn 1": lambda one: one.part == "two-replicas" and one.turn == 1,
    "two replicas, turns 2+": lambda one: one.part == "two-replicas" and one.turn > 1,
}


def read(path: Path) -> list[Asked]:
    return [Asked(**one) for one in json.loads(path.read_text(encoding="utf-8"))]


def by_system(path: Path) -> int:
    return SYSTEMS.index(path.stem)


def percentiles(asked: Sequence[Asked]) -> tuple[float, float, float]:
    """p50, p90 and p99 of the time to the first token, in milliseconds."""
    ordered = sorted(1000 * one.ttft_s for one in asked)
    p50, p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
    return p50, p90, p99


def print_table(figures: dict[str, list[Asked]]) -> None:
    print("\n| TTFT in ms: p50 / p90 / p99 |", " | ".join(figures), "|")
    print("|---|" + "---|" * len(figures))
    medians: dict[tuple[str, str], float] = {}
    for row, belongs in ROWS.items():
        cells = []
        for system, asked in figures.items():
            mine = [one for one in asked if belongs(one)]
            if mine:
                medians[system, row] = percentiles(mine)[0]
            cells.append(" / ".join(f"{value:.0f}" for value in percentiles(mine)) if mine else "-")
        print(f"| {row} | {' | '.join(cells)} |")
    for row, belongs in ROWS.items():
        cells = [
            f"{sum(one.num_encodes for one in asked if belongs(one))} of {sum(map(belongs, asked))}"
            for asked in figures.values()
        ]
        print(f"| encodes of questions, {row} | {' | '.join(cells)} |")
    print()
    for row, other, goal in (("turns 2+", "monolith", 0.35), ("after a restart", "cache-off", 0.5)):
        if ("ours", row) in medians and (other, row) in medians:
            ratio = medians["ours", row] / medians[other, row]
            print(f"{row}: ours / {other} {ratio:.2f} at the median (goal {goal})")


def draw_chart(figures: dict[str, list[Asked]], path: Path) -> None:
    """Medians as bars, up to p99 as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    width = 0.8 / len(figures)
    for index, (system, asked) in enumerate(figures.items()):
        for number, belongs in enumerate(ROWS.values()):
            mine = [one for one in asked if belongs(one)]
            if not mine:
                continue
            p50, _, p99 = percentiles(mine)
            place = number + (index - (len(figures) - 1) / 2) * width
            axes.bar(place, p50, width, color=f"C{index}", label=system if number == 0 else None)
            axes.plot([place, place], [p50, p99], color="black", linewidth=1)
    axes.set_xticks(range(len(ROWS)), [row.replace(", ", ",\n").replace("80 % ", "80 %\n") for row in ROWS])
    axes.set_ylabel("time to first token, ms (bar: p50, line: to p99)")
    axes.legend(frameon=False, ncols=len(figures), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
