"""A running `omnilmm serve` seen from a test: its process, its HTTP side, its Ray, and the goldens to ask it for."""

import base64
import json
import logging
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

APP = "omnilmm"
SLOW_READER_S = 5.0
"""How long the shared cluster's proxies wait for a reader: short, because a test waits for it."""
FAMILIES = {"omnilmm-3b": "minicpm-v-tiny", "omnilmm-12b": "omnilmm-12b-tiny"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def data_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Poll for a state of the cluster that no event reaches us about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.1)


@dataclass
class Cluster:
    """A running `omnilmm serve`: its process, what it printed, and how to reach it."""

    process: subprocess.Popen[str]
    url: str
    config: Path
    lines: list[str] = field(default_factory=list)
    printed: threading.Condition = field(default_factory=threading.Condition)

    def read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.printed:
                self.lines.append(line.rstrip("\n"))
                self.printed.notify_all()

    def await_line(self, text: str, timeout_s: float) -> str:
        """The first line that has `text` in it."""
        deadline = time.monotonic() + timeout_s
        with self.printed:
            while True:
                for line in self.lines:
                    if text in line:
                        return line
                left = deadline - time.monotonic()
                assert self.process.poll() is None, "the server ended:\n" + "\n".join(self.lines)
                assert left > 0, f"no line with {text!r}:\n" + "\n".join(self.lines)
                self.printed.wait(min(left, 0.5))

    def post(self, body: dict, prefix: str = "", **options) -> httpx.Response:
        return httpx.post(f"{self.url}{prefix}/v1/chat/completions", json=body, timeout=60, **options)

    def stats(self, deployment: str, app: str = APP) -> dict:
        """What one replica of a pool says of itself."""
        from ray import serve

        return serve.get_deployment_handle(deployment, app_name=app).stats.remote().result(timeout_s=60)

    def num_encodes(self, model: str, app: str = APP) -> int:
        return self.stats(f"vision-{model}", app)["num_pictures"]

    def num_replicas(self, deployment: str, app: str = APP) -> int:
        from ray import serve

        return sum(serve.status().applications[app].deployments[deployment].replica_states.values())


@contextmanager
def application(name: str, args: dict) -> Iterator[str]:
    """A further application on the shared cluster, at /name; gives its deployment's prefix in the URL."""
    from ray import serve

    from deployments.app import build
    from deployments.settings import AppSettings

    serve.run(build(AppSettings.model_validate(args)), name=name, route_prefix=f"/{name}")
    try:
        yield f"/{name}"
    finally:
        serve.delete(name)


@dataclass
class Golden:
    """A reference case as a request over HTTP, and what the original answered."""

    model: str
    image: str
    conversation: str
    messages: list[dict]
    picture: Path
    text: str
    num_tokens: int

    def body(self, **changes) -> dict:
        messages = [dict(message) for message in self.messages]
        question = {"type": "text", "text": messages[0]["content"]}
        messages[0]["content"] = [{"type": "image_url", "image_url": {"url": data_uri(self.picture)}}, question]
        greedy = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": self.num_tokens}
        return {"model": self.model, "messages": messages, **greedy, **changes}


def read_goldens(data: Path, extra: Path | None) -> list[Golden]:
    goldens = []
    for model, folder in FAMILIES.items():
        document = json.loads((data / folder / "goldens.json").read_text(encoding="utf-8"))
        for case in document["cases"]:
            places = [data / "images" / case["image"], *([extra / case["image"]] if extra else [])]
            picture = next((place for place in places if place.exists()), None)
            if picture is None:
                continue
            run = case["greedy"]
            messages = document["conversations"][case["conversation"]]
            named = (model, case["image"], case["conversation"], messages, picture)
            goldens.append(Golden(*named, run["text"], len(run["sequence_ids"]) - 1))
    return goldens


def model_settings(data: Path, name: str) -> dict:
    """Both families as the reference was computed. The 12B's vision pool may sleep."""
    settings: dict = {
        "name": name,
        "path": str(data / FAMILIES[name]),
        "dtype": "float32",
        "input_handling": "original",
        "decoder": {"num_blocks": 512},
    }
    if name == "omnilmm-12b":
        sleepy = {"min_replicas": 0, "initial_replicas": 1, "max_replicas": 1}
        settings["vision"] = {"autoscaling": sleepy | {"look_back_period_s": 11, "downscale_delay_s": 1}}
    return settings


def connect(running: Cluster) -> None:
    import ray

    address = re.search(r"Ray is up at (\S+)", running.await_line("Ray is up at", 5))
    assert address is not None
    ray.init(address=address.group(1), namespace="serve", log_to_driver=False, logging_level=40)


def disconnect() -> None:
    import ray

    if ray.is_initialized():
        logging.getLogger("ray.serve").disabled = True  # its threads outlive the connection, and complain
        ray.shutdown()
