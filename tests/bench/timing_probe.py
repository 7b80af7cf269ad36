"""Can a tenant learn with a stopwatch which pictures another one has sent?

    python tests/bench/timing_probe.py [--pairs 200] [--model PATH]
    python tests/bench/timing_probe.py --url URL --name MODEL --keys KEY_A KEY_B

Starts `omnilmm serve` with two tenants and the built-in tiny model (or talks to a server that runs). Alice sends a
picture nobody has seen; then

    across   Bob sends that picture, and one that nobody has seen, in random order
    inside   Alice sends that picture again, and one that nobody has seen, in random order

and how long each answer of one token took is compared: AUC is the chance that the picture that was seen before is the
quicker one of a random pair, 0.5 for a coin. Goals: across at most 0.55, inside at least 0.9 (the probe can see hits).
Exit status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import secrets
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml
from bench_servers import Server, _free_port
from PIL import Image

from omnilmm.tenancy.keys import new_key

MAX_ACROSS, MIN_INSIDE = 0.55, 0.9
SIDE = 1200  # a photograph of a telephone, made smaller by its sender
TINY = Path(__file__).parents[1] / "data" / "minicpm-v-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--model", type=Path, default=TINY, help="checkpoint folder for a server of our own")
    parser.add_argument("--url", help="a running server; then --name and --keys too")
    parser.add_argument("--name", default="probe")
    parser.add_argument("--keys", nargs=2, metavar="KEY")
    options = parser.parse_args()
    if options.url:
        across, inside = probe(Prober(options.url, options.name, *options.keys), options.pairs)
    else:
        with own_server(options.model, options.name) as prober:
            across, inside = probe(prober, options.pairs)
    print(f"across tenants  AUC {across:.3f}   goal at most {MAX_ACROSS}")
    print(f"inside a tenant AUC {inside:.3f}   goal at least {MIN_INSIDE}")
    sys.exit(across > MAX_ACROSS or inside < MIN_INSIDE)


@dataclass(frozen=True)
class Prober:
    """Asks as Alice or as Bob, and takes the time."""

    url: str
    name: str
    alice: str
    bob: str

    def seconds(self, client: httpx.Client, key: str, picture: str) -> float:
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is this?"}]
        body = {"model": self.name, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"}
        begun = time.perf_counter()
        response = client.post(f"{self.url}/v1/chat/completions", json=body | {"temperature": 0}, headers=headers)
        taken = time.perf_counter() - begun
        if response.status_code != 200:
            raise SystemExit(response.text)
        return taken


def probe(prober: Prober, pairs: int) -> tuple[float, float]:
    """AUC across and inside."""
    seen_across, new_across, seen_inside, new_inside = [], [], [], []
    with httpx.Client(timeout=120) as client:
        for _ in range(5):  # not counted: first use of everything
            prober.seconds(client, prober.alice, picture())
            prober.seconds(client, prober.bob, picture())
        for number in range(pairs):
            shared = picture()
            prober.seconds(client, prober.alice, shared)
            # Bob before Alice's second time and after it in turn, in case the order of the two matters.
            rounds = [(prober.bob, seen_across, new_across), (prober.alice, seen_inside, new_inside)]
            for key, seen, new in rounds if number % 2 else reversed(rounds):
                for url, times in shuffled([(shared, seen), (picture(), new)]):
                    times.append(prober.seconds(client, key, url))
    for name, seen, new in (("across", seen_across, new_across), ("inside", seen_inside, new_inside)):
        print(f"{name}: seen p50 {1000 * median(seen):.1f} ms, new p50 {1000 * median(new):.1f} ms, {pairs} pairs")
    return auc(seen_across, new_across), auc(seen_inside, new_inside)


def auc(quick: Sequence[float], slow: Sequence[float]) -> float:
    """The share of pairs in which the first is smaller; ties count half (Mann and Whitney's U, by all pairs)."""
    ordered = sorted(slow)
    wins = sum(2 * len(ordered) - bisect_left(ordered, x) - bisect_right(ordered, x) for x in quick)
    return wins / (2 * len(quick) * len(slow))


def median(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]


def shuffled(items: list[tuple[str, list[float]]]) -> list[tuple[str, list[float]]]:
    return random.sample(items, len(items))


def picture() -> str:
    """A JPEG nobody has seen, as a data URI."""
    noise = Image.frombytes("RGB", (64, 64), secrets.token_bytes(3 * 64 * 64)).resize((SIDE, SIDE))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def own_server(checkpoint: Path, name: str) -> Iterator[Prober]:
    (alice, alices), (bob, bobs) = new_key(), new_key()
    keys = [{"tenant": "alice", "sha256": alices}, {"tenant": "bob", "sha256": bobs}]
    models = [{"name": name, "path": str(checkpoint.resolve()), "dtype": "float32"}]
    port = _free_port()
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "serve_config.yaml"
        config.write_text(yaml.safe_dump({"applications": [{"args": {"models": models, "keys": keys}}]}))
        command = [sys.executable, "-m", "cluster.cli", "serve", "--config", str(config), "--port", str(port)]
        log = Path(scratch) / "server.log"
        with Server(command, port=port, ready_path="/ready", log=log, env={}, key=alice) as server:
            yield Prober(server.base, name, alice, bob)


if __name__ == "__main__":
    main()
