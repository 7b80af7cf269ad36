"""SIGKILL of a router, and of everything, while a batch runs: rows F04, F07, F24 and F40 of the catalogue.

A server of its own, which ends before the shared one begins (hence the name: modules run in order). One seed each in
the ordinary run; OMNILMM_E2E_CRASH_SEEDS=5 for five.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from e2e_cluster import Cluster, free_port, model_settings, wait_until

from deployments.settings import CACHE_SECRET_VARIABLE, DATABASE_VARIABLE
from omnilmm.batch.states import NEXT, Status

pytestmark = pytest.mark.e2e

SEEDS = range(int(os.environ.get("OMNILMM_E2E_CRASH_SEEDS", "1")))
NUM_LINES, NUM_TOKENS = 400, 120
MODEL = "omnilmm-3b"
START_TIMEOUT_S, END_TIMEOUT_S = 180, 240


class World:
    """A server that can be killed and started again over the same database and folder."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.folder, self._database = folder, folder / "omnilmm.db"
        config = folder / "serve_config.yaml"
        args = {"models": [model_settings(data, MODEL)], "cache": {"redis": "none"}}
        config.write_text(yaml.safe_dump({"applications": [{"import_path": "deployments.app:build", "args": args}]}))
        self._config = config
        self.start()

    def start(self) -> None:
        self._scratch = tempfile.mkdtemp(prefix="omnilmm-crash-", dir="/tmp")
        port = free_port()
        environment = os.environ | {"PYTHONUNBUFFERED": "1", CACHE_SECRET_VARIABLE: "s" * 32}
        environment[DATABASE_VARIABLE] = f"sqlite:///{self._database}"
        command = [sys.executable, "-m", "cluster.cli", "serve", "--config", str(self._config)]
        process = subprocess.Popen(
            [*command, "--port", str(port), "--temp-dir", self._scratch],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.running = Cluster(process, f"http://127.0.0.1:{port}", self._config)
        self._reader = threading.Thread(target=self.running.read_output, daemon=True)
        self._reader.start()
        self.running.await_line("Ctrl-C stops", START_TIMEOUT_S)

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.running.process.pid)
        return [*parent.children(recursive=True), parent]

    def kill_router(self) -> None:
        routers = [process for process in self.family() if "servereplica:omnilmm:router" in _title(process).lower()]
        assert routers, [_title(process) for process in self.family()]
        for process in routers:
            process.kill()

    def kill_everything(self) -> None:
        family = self.family()
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=20)
        self._close()

    def stop(self) -> None:
        if self.running.process.poll() is None:
            self.kill_everything()

    def _close(self) -> None:
        self.running.process.wait(20)
        self._reader.join(10)
        self.running.process.stdout.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def num_answered(self, batch_id: str) -> int:
        """Records in the journal: what the database will say at the next renewal."""
        segments = (self.folder / "storage" / "batches" / batch_id).glob("journal.*")
        return sum(path.read_bytes().count(b"\n") for path in segments)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def world(data, tmp_path_factory):
    world = World(data, tmp_path_factory.mktemp("crash"))
    try:
        yield world
    finally:
        world.stop()


def submit(url: str) -> str:
    lines = []
    for i in range(NUM_LINES):
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"Tell me about {i}."}], "temperature": 0}
        body |= {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        if i % 40 == 7:
            body["max_tokens"] = 10**6  # goes to the error file
        lines.append({"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with httpx.Client(base_url=url, timeout=60) as client:
        stored = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
        assert stored.status_code == 200, stored.text
        asked = {"input_file_id": stored.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=asked)
        assert batch.status_code == 200, batch.text
    return batch.json()["id"]


def look(url: str, batch_id: str) -> dict | None:
    """The batch; None while nobody answers."""
    try:
        response = httpx.get(f"{url}/v1/batches/{batch_id}", timeout=30)
    except httpx.TransportError:
        return None
    return response.json() if response.status_code == 200 else None


def await_end(world: World, batch_id: str, before: dict) -> dict:
    """The ended batch; every state on the way may follow the one before it."""
    batch, deadline = before, time.monotonic() + END_TIMEOUT_S
    while not Status(batch["status"]).is_final:
        assert time.monotonic() < deadline, batch
        time.sleep(0.2)
        now = look(world.running.url, batch_id)
        if now is not None:
            assert leads(Status(batch["status"]), Status(now["status"])), (batch["status"], now["status"])
            batch = now
    return batch


def leads(before: Status, after: Status) -> bool:
    return before is after or any(leads(step, after) for step in NEXT[before])


def check(world: World, batch: dict) -> None:
    assert batch["status"] == "completed", batch
    with httpx.Client(base_url=world.running.url, timeout=60) as client:
        contents = {
            name: client.get(f"/v1/files/{batch[name]}/content") for name in ("output_file_id", "error_file_id")
        }
    entries = {name: [json.loads(raw) for raw in got.text.splitlines()] for name, got in contents.items()}
    ids = [entry["custom_id"] for found in entries.values() for entry in found]
    assert len(ids) == NUM_LINES
    assert set(ids) == {f"c{i}" for i in range(NUM_LINES)}
    for entry in entries["output_file_id"]:
        assert entry["response"]["body"]["usage"]["completion_tokens"] == NUM_TOKENS
    assert {entry["response"]["body"]["error"]["code"] for entry in entries["error_file_id"]} == {
        "context_length_exceeded"
    }
    counts = batch["request_counts"]
    assert (counts["total"], counts["failed"]) == (NUM_LINES, len(entries["error_file_id"]))
    assert not (world.folder / "storage" / "batches" / batch["id"]).exists()


def begin(world: World, seed: int, kind: str) -> str:
    """A batch that is so far on as the seed says."""
    batch_id = submit(world.running.url)
    share = random.Random(f"{kind}/{seed}").uniform(0.05, 0.6)
    wait_until(lambda: world.num_answered(batch_id) >= share * NUM_LINES, "the batch has come so far", 120)
    before = look(world.running.url, batch_id)
    assert before is not None
    assert before["status"] == "in_progress", "the batch was over before the blow"
    return batch_id


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_router_loses_nothing(world, seed):
    batch_id = begin(world, seed, "router")
    before = look(world.running.url, batch_id)
    world.kill_router()
    check(world, await_end(world, batch_id, before))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_cluster_loses_nothing(world, seed):
    batch_id = begin(world, seed, "cluster")
    before = look(world.running.url, batch_id)
    world.kill_everything()
    world.start()
    check(world, await_end(world, batch_id, before))
