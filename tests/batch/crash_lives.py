"""Kills a batch worker again and again, at every kind of moment, and looks at what comes out.

`python crash_lives.py FOLDER FIRST_SEED NUM_SEEDS` prints one JSON object per seed. Each life of the worker is a forked
child that sends itself SIGKILL at a moment drawn from the seed: before, after or in the middle of a write, a sync, a
rename, a link, a removal, a transaction or an answer. The last life is left alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from batch_fakes import Echo, HandClock, jsonl, line, make_desk, results, submit

from omnilmm.batch.job import WorkRules
from omnilmm.batch.states import NEXT, Status
from omnilmm.batch.worker import BatchWorker
from omnilmm.database import Database

NUM_LINES, MAX_LIVES = 24, 6
RULES = WorkRules(lease_s=30.0, renew_every_s=5.0, max_running=4)
HOOKED = ("write", "fsync", "fdatasync", "rename", "link", "mkdir", "unlink", "rmdir")


async def a_few_turns(seconds):
    """Stands for every sleep: a few answers come between two renewals of the claim."""
    for _ in range(10):
        await asyncio.sleep(0)


class Fate:
    """Counts moments and ends the process at the one that was drawn."""

    def __init__(self, dice: random.Random, last: bool) -> None:
        self._dice = dice
        self._left = float("inf") if last else dice.randint(1, dice.choice((10, 40, 120)))

    def comes(self) -> bool:
        self._left -= 1
        return self._left <= 0

    def step(self) -> None:
        if self.comes():
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, name: str) -> None:
        real = getattr(os, name)

        def hooked(*args, **options):
            if not self.comes():
                return real(*args, **options)
            if name == "write":
                real(args[0], bytes(args[1])[: self._dice.randint(0, len(args[1]))])
            elif self._dice.random() < 0.5:
                real(*args, **options)
            return os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, hooked)


class Noting(Echo):
    """Notes every answer it begins in a file that survives it."""

    def __init__(self, note: Path, fate: Fate) -> None:
        super().__init__()
        self._note = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._fate, self._write = fate, os.write

    async def think(self, number):
        await asyncio.sleep(0)
        self._fate.step()

    async def answer(self, endpoint, body, *, tenant, request_id, batch_id):
        self._write(self._note, body["messages"][-1]["content"].encode() + b"\n")
        return await super().answer(endpoint, body, tenant=tenant, request_id=request_id, batch_id=batch_id)


def hook_transactions(fate: Fate) -> None:
    real = Database.write

    @contextmanager
    def write(self):
        fate.step()
        with real(self) as connection:
            yield connection
            fate.step()
        fate.step()

    Database.write = write


def live(root: Path, seed: int, life: int) -> None:
    """One life: submit the batch if there is none yet, then work until death or until nothing is left to do."""
    fate = Fate(random.Random(f"{seed}/{life}"), last=life == MAX_LIVES)
    answerer = Noting(root / "begun", fate)
    for name in HOOKED:
        fate.hook(name)
    hook_transactions(fate)
    clock = HandClock(1_800_000_000.0 + 100 * life)
    desk = make_desk(root, clock)
    if not desk.batches.list("acme").items:
        submit(desk, jsonl(*(line(f"r{i}", f"{i}") for i in range(NUM_LINES))))
    worker = BatchWorker(desk, answerer, RULES, clock=clock, sleep=a_few_turns)
    while asyncio.run(worker.run_one()):
        pass


def fork(root: Path, seed: int, life: int) -> bool:
    """True if the life ended by itself."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            live(root, seed, life)
            status = 0
        finally:
            os._exit(status)
    _, how = os.waitpid(child, 0)
    if os.WIFEXITED(how):
        assert os.WEXITSTATUS(how) == 0, "a life ended with an error"
        return True
    return False


def look(root: Path) -> Status | None:
    """The state of the batch, in a process of its own: the one that forks must not open the database."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        items = make_desk(root).batches.list("acme").items
        os.write(sending, items[0].status.value.encode() if items else b"-")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(sending)
    told = os.read(receiving, 100).decode()
    os.close(receiving)
    return None if told == "-" else Status(told)


def leads(before: Status, after: Status) -> bool:
    """Whether one state can come after the other, over however many steps."""
    return before is after or any(leads(step, after) for step in NEXT[before])


def check(root: Path, num_lives: int) -> dict[str, int]:
    desk = make_desk(root, HandClock(1_800_000_000.0))
    (batch,) = desk.batches.list("acme").items
    output, errors = results(desk, batch)
    assert batch.status is Status.COMPLETED, batch.status
    assert set(output) == {f"r{i}" for i in range(NUM_LINES)}
    assert not errors
    assert all(
        entry["response"]["body"]["choices"][0]["message"]["content"] == name[1:] for name, entry in output.items()
    )
    begun = Counter((root / "begun").read_text().splitlines())
    assert set(begun) == {str(i) for i in range(NUM_LINES)}
    again = sum(begun.values()) - NUM_LINES
    assert again <= num_lives * RULES.max_running, f"{again} lines were begun again in {num_lives} lives"
    desk.batches.check_integrity()
    desk.files.check_integrity()
    for path in [*desk.files.blobs.incoming(), *desk.files.blobs.blobs(), *(root / "batches").iterdir()]:
        os.utime(path, (0, 0))  # old enough for the sweep
    desk.sweep()
    assert {blob.name for blob in desk.files.blobs.blobs()} == {f.id for f in desk.files.list("acme").items}
    assert not [*desk.files.blobs.incoming(), *(root / "batches").iterdir()]
    return {"lives": num_lives, "again": again}


def main() -> None:
    folder, first, num = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for seed in range(first, first + num):
        root = folder / str(seed)
        root.mkdir()
        before = None
        for life in range(1, MAX_LIVES + 1):
            ended = fork(root, seed, life)
            if ended:
                break
            after = look(root)
            assert before is None or (after is not None and leads(before, after)), f"{before} became {after}"
            before = after
        receiving, sending = os.pipe()
        if os.fork() == 0:
            try:
                os.write(sending, json.dumps({"seed": seed} | check(root, life)).encode())
            finally:
                os._exit(0)
        os.wait()
        os.close(sending)
        print(os.read(receiving, 4096).decode() or f"seed {seed} failed", flush=True)
        os.close(receiving)


if __name__ == "__main__":
    main()
