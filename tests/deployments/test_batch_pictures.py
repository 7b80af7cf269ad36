"""Row B07 of the catalogue: pictures in the lines of a batch meet the guards that they meet online (rows I, D, U)."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from bad_pictures import PICTURES

sys.path.insert(0, str(Path(__file__).parents[1] / "batch"))
from batch_fakes import jsonl, line, make_desk, results, submit

from cluster.batch_service import LocalService
from deployments.batch import ServiceAnswerer
from omnilmm.batch.states import Status
from omnilmm.batch.worker import BatchWorker
from omnilmm.config import EngineConfig
from omnilmm.pipeline import Pipeline
from omnilmm.tenancy.keys import Tenant

ALLOWED = "pictures.example"


def asking(custom_id, reference):
    parts = [{"type": "image_url", "image_url": {"url": reference}}, {"type": "text", "text": "What is it?"}]
    entry = line(custom_id)
    entry["body"] = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
    return entry


async def answers(data, folder, cases, hosts=()):
    """(status, code) of every case as a line of one batch, by its name."""
    desk = make_desk(folder)
    engine = EngineConfig(num_blocks=256, max_sequences=8)
    async with Pipeline.load(str(data / "minicpm-v-tiny"), name="m", dtype="float32", engine=engine) as pipeline:
        service = LocalService.over(pipeline, "m", hosts=hosts)
        batch = submit(desk, jsonl(*(asking(name, reference) for name, reference in cases)))
        await BatchWorker(desk, ServiceAnswerer(service, lambda name: Tenant(name, name))).run_one()
        await service.aclose()
    batch = desk.batches.get("acme", batch.id)
    assert batch.status is Status.COMPLETED
    told = {}
    for entries in results(desk, batch):
        for name, entry in entries.items():
            body = entry["response"]["body"]
            told[name] = entry["response"]["status_code"], body.get("error", {}).get("code")
    assert batch.counts.completed == sum(status == 200 for status, _ in told.values())
    desk.batches.check_integrity()
    return told


async def test_every_picture_of_the_catalogue(data, tmp_path):
    cases = {f"{i}-{row}": (reference, wanted) for i, (row, reference, wanted) in enumerate(PICTURES)}
    told = await answers(data, tmp_path, [(name, reference) for name, (reference, _) in cases.items()])
    assert told == {name: wanted for name, (_, wanted) in cases.items()}


async def test_where_some_hosts_are_allowed_the_others_are_not_even_looked_up(data, tmp_path, monkeypatch):
    looked_up = []
    real = socket.getaddrinfo

    def note(host, *args, **options):
        looked_up.append(host)
        return real("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", note)
    cases = [(f"{i}-{row}", reference) for i, (row, reference, _) in enumerate(PICTURES) if row.startswith("U")]
    assert cases
    told = await answers(data, tmp_path, [*cases, ("last", f"http://{ALLOWED}:22/a.png")], hosts=[ALLOWED])
    assert all(status == 400 for status, _ in told.values()), told
    assert looked_up == []
