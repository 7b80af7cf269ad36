"""A desk over a real database and disk, an answerer that echoes, and a clock moved by hand."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from omnilmm.batch.desk import BatchDesk, WorkFolders
from omnilmm.batch.job import WorkRules
from omnilmm.batch.store import BatchStore
from omnilmm.database import Database
from omnilmm.errors import NotFound
from omnilmm.files.store import FileStore, Purpose

ENDPOINT = "/v1/chat/completions"


class HandClock:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Echo:
    """Answers with the last message's text. `script` may hold an exception, or a list of them, by that text."""

    def __init__(self, **script) -> None:
        self.script = {text: list(errors) if isinstance(errors, list) else errors for text, errors in script.items()}
        self.asked: list[str] = []
        self.running = self.most_running = 0
        self.begun = asyncio.Event()
        self.models = {"m"}

    def check_model(self, tenant, model):
        if model not in self.models:
            raise NotFound("The model does not exist.", param="model", code="model_not_found")

    async def answer(self, endpoint, body, *, tenant, request_id, batch_id):
        text = body["messages"][-1]["content"]
        if not isinstance(text, str):
            text = text[-1]["text"]
        self.asked.append(text)
        self.running += 1
        self.begun.set()
        self.most_running = max(self.most_running, self.running)
        try:
            await self.think(len(self.asked))
            error = self.script.get(text)
            if isinstance(error, list):
                error = error.pop(0) if error else None
            if error is not None:
                raise error
        finally:
            self.running -= 1
        return {
            "id": f"chatcmpl-{request_id}",
            "choices": [{"message": {"content": text}}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        }

    async def think(self, number):
        await asyncio.sleep(0)


class Stuck(Echo):
    """Answers the first lines, and the others when the gate is opened."""

    def __init__(self, num_free, **script) -> None:
        super().__init__(**script)
        self._num_free = num_free
        self.gate = asyncio.Event()

    async def think(self, number):
        if number > self._num_free:
            await self.gate.wait()

    def is_stuck(self):
        """The free lines have been answered and written down: everyone who works is at a later one."""
        return len(self.asked) == self._num_free + QUICK.max_running


def line(custom_id, text="hello", **changes):
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body} | changes


def jsonl(*lines) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in lines)


def make_desk(root: Path, clock=None) -> BatchDesk:
    times = {} if clock is None else {"clock": clock}
    database = Database(f"sqlite:///{root}/records.db")
    files = FileStore(database, root / "files", **times)
    return BatchDesk(BatchStore(database, **times), files, WorkFolders(root / "batches"))


def upload(desk, content: bytes, tenant="acme", purpose=Purpose.BATCH):
    with desk.files.upload(tenant, max_bytes=10**9) as receiving:
        receiving.write(content)
        return receiving.finish(purpose=purpose, filename="in.jsonl").id


def submit(desk, content: bytes, tenant="acme", endpoint=ENDPOINT):
    file_id = upload(desk, content, tenant)
    return desk.submit(tenant, endpoint=endpoint, input_file_id=file_id, completion_window="24h")


def results(desk, batch, tenant="acme"):
    """(output lines, error lines) of a batch, each by custom_id; refuses one that is there twice."""
    found = []
    for file_id in (batch.output_file_id, batch.error_file_id):
        entries = {}
        if file_id is not None:
            with desk.files.open(tenant, file_id) as file:
                for raw in file:
                    entry = json.loads(raw)
                    assert entry["custom_id"] not in entries
                    entries[entry["custom_id"]] = entry
        found.append(entries)
    assert not found[0].keys() & found[1].keys()
    return found


async def soon(seconds):
    """Stands for every sleep: the others get their turn, no time passes."""
    await asyncio.sleep(0)


QUICK = WorkRules(lease_s=30.0, renew_every_s=5.0, storage_retry_s=1.0, max_running=4)
