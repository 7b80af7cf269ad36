"""Batches beside a router: its service answers their lines, and the sweeper forgets what has expired."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "batch"))
from batch_fakes import HandClock, jsonl, line, make_desk, results, submit

from cluster.batch_service import LocalService
from deployments.batch import BatchService, ServiceAnswerer, remove_expired
from omnilmm.batch.job import WorkRules
from omnilmm.batch.states import Status
from omnilmm.errors import InvalidRequest, NotFound, Overloaded
from omnilmm.files.store import Purpose
from omnilmm.messages import Priority
from omnilmm.pipeline import Pipeline
from omnilmm.tenancy.keys import Tenant

TENANTS = {"acme": Tenant("acme", "acme", models=frozenset({"m"}))}


def find_tenant(name):
    if name not in TENANTS:
        raise NotFound("There is no such tenant.")
    return TENANTS[name]


class Eraser:
    def __init__(self):
        self.erased, self.is_away = [], False

    async def __call__(self, tenant, data):
        if self.is_away:
            raise Overloaded("away")
        self.erased.append((tenant.name, data))


async def test_a_batch_is_answered_by_the_service_itself(data, tmp_path):
    """Tiny weights, the real checks and the real flow: an answer, a refusal, and the priority of batches."""
    desk = make_desk(tmp_path)
    seen = []
    async with Pipeline.load(str(data / "minicpm-v-tiny"), name="m", dtype="float32") as pipeline:
        service = LocalService.over(pipeline, "m")
        real = pipeline.flow.answer

        def answer(request, **options):
            seen.append((request.priority, request.tenant))
            return real(request, **options)

        service.flows = {"m": SimpleNamespace(card=pipeline.card, answer=answer)}
        good, bad = line("a", "How many?"), line("b", "Why?")
        good["body"] |= {"max_tokens": 3, "temperature": 0}
        bad["body"] |= {"max_tokens": 10**6}
        batch = submit(desk, jsonl(good, bad))
        gone = submit(desk, jsonl(good), tenant="gone")
        background = BatchService(desk, service, find_tenant, Eraser(), rules=WorkRules(renew_every_s=1.0))
        background.start()
        for waiting in (batch, gone):
            while not (now := desk.batches.get(waiting.tenant, waiting.id)).status.is_final:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert now.status is (Status.COMPLETED if waiting is batch else Status.FAILED)
        await background.aclose()
        await service.aclose()
    output, errors = results(desk, desk.batches.get("acme", batch.id))
    assert output["a"]["response"]["body"]["usage"]["completion_tokens"] == 3
    assert errors["b"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert seen == [(Priority.BATCH, "acme")] * len(seen) != []


def test_models_are_checked_for_the_tenant_of_the_batch():
    answerer = ServiceAnswerer(SimpleNamespace(flows={"m": None, "other": None}), find_tenant)
    answerer.check_model("acme", "m")
    for tenant, model in (("acme", "other"), ("acme", "nothing"), ("gone", "m")):
        with pytest.raises(NotFound):
            answerer.check_model(tenant, model)


async def test_an_endpoint_line_is_checked_like_a_request():
    answerer = ServiceAnswerer(SimpleNamespace(flows={}, request_timeout_s=1.0), find_tenant)
    with pytest.raises(InvalidRequest):
        await answerer.answer("/v1/chat/completions", {"model": "m"}, tenant="acme", request_id="r")


async def test_expired_pictures_are_forgotten_everywhere(tmp_path):
    clock, eraser = HandClock(), Eraser()
    files = make_desk(tmp_path, clock).files

    def put(tenant, purpose, expires_after):
        with files.upload(tenant, max_bytes=100) as upload:
            upload.write(b"picture")
            return upload.finish(purpose=purpose, filename="a", expires_after=expires_after)

    put("acme", Purpose.VISION, 3600)
    put("acme", Purpose.USER_DATA, 3600)
    put("gone", Purpose.VISION, 3600)
    kept = put("acme", Purpose.VISION, None)
    assert await remove_expired(files, find_tenant, eraser) == 0
    clock.now += 3601
    eraser.is_away = True
    assert await remove_expired(files, find_tenant, eraser) == 2  # the picture waits until the cache can be told
    eraser.is_away = False
    assert await remove_expired(files, find_tenant, eraser) == 1
    assert eraser.erased == [("acme", b"picture")]
    assert [blob.name for blob in files.blobs.blobs()] == [kept.id]
