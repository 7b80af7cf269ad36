"""A router's service without Serve, and a flow whose decoder says what it is told: quick, and the same every time."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from deployments.http import make_app
from deployments.metrics_page import MetricsPage
from deployments.storage import Storage
from omnilmm.cache.key import KeyRing
from omnilmm.cache.store import open_store
from omnilmm.card import ModelCard
from omnilmm.config import CacheConfig, Family, ImageLimits, ImagePolicy, InputHandling
from omnilmm.database import Database
from omnilmm.errors import OmniError
from omnilmm.flow import ChatFlow
from omnilmm.image.pool import InlinePreparer
from omnilmm.image.reader import ImageReader
from omnilmm.messages import (
    Embedding,
    Encoded,
    FinishReason,
    GenerateCall,
    Prefill,
    PreparedImage,
    TokenBatch,
    TokenLogprob,
)
from omnilmm.pipeline import SystemClock
from omnilmm.prompt.template import load_template
from omnilmm.tenancy.governor import Governor
from omnilmm.tenancy.idempotency import IdempotencyStore
from omnilmm.tenancy.keys import AdminKeys, KeyBook
from omnilmm.tenancy.lines import Lines
from omnilmm.tenancy.places import Places
from omnilmm.tenancy.usage import Receipt

SECRET = b"a secret of thirty-two bytes.... "
ANSWER = (549, 374, 649, 539, 710)


class Encoder:
    """Vectors that name the picture."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def encode(
        self, picture: PreparedImage, *, key: str, by_value: bool, timeout_s: float, keep: bool = True
    ) -> Encoded:
        self.num_calls += 1
        embedding = Embedding("float32", (1, 1), hashlib.sha256(picture.square).digest()[:4])
        return Encoded(embedding, stored=False, seconds=0.01, kept_bytes=len(embedding.data) if keep else 0)


class Decoder:
    """Says ANSWER, one token a batch, as far as `max_tokens` goes, and stops, or says it again if nothing stops it.

    `failures` are raised, one a call, in front of the token of that number. `gates` hold the call of that number in
    front of its second token; `entered` is set by the first call, `num_open` counts those still open.
    """

    def __init__(self) -> None:
        self.calls: list[GenerateCall] = []
        self.failures: dict[int, tuple[int, BaseException]] = {}
        self.gates: dict[int, asyncio.Event] = {}
        self.entered = asyncio.Event()
        self.num_open = 0
        self.ids = ANSWER

    async def generate(self, call: GenerateCall, *, affinity: str) -> AsyncGenerator[TokenBatch, None]:
        number = len(self.calls)
        self.calls.append(call)
        self.entered.set()
        self.num_open += 1
        fails_at, failure = self.failures.get(number, (-1, OmniError("never")))
        try:
            prefill: Prefill | None = Prefill(len(call.prompt.ids), 3 if number else 0, (), 0.0)
            wanted = call.sampling.max_tokens
            ids = self.ids[:wanted] if call.sampling.stop_ids else (self.ids * (1 + wanted // len(self.ids)))[:wanted]
            for position, token_id in enumerate(ids):
                if position < len(call.emitted):
                    continue
                if position == fails_at:
                    raise failure
                if position == 1 and number in self.gates:
                    await self.gates[number].wait()
                await asyncio.sleep(0)
                is_last = position == len(ids) - 1
                yield TokenBatch((token_id,), self._logprobs(call, token_id), prefill, self._finish(call, is_last))
                prefill = None
            if self._finish(call, True) is None:
                yield TokenBatch((call.sampling.stop_ids[0],), finish=FinishReason.STOP)
        finally:
            self.num_open -= 1

    def _finish(self, call: GenerateCall, is_last: bool) -> FinishReason | None:
        is_cut = not call.sampling.stop_ids or call.sampling.max_tokens <= len(self.ids)
        return FinishReason.LENGTH if is_last and is_cut else None

    def _logprobs(self, call: GenerateCall, token_id: int) -> tuple[TokenLogprob, ...]:
        wanted = call.sampling.logprobs
        if wanted is None:
            return ()
        return (TokenLogprob(-0.5, tuple((token_id + i, -0.5 - i) for i in range(wanted))),)


class Silence:
    def emit(self, event: object) -> None:
        return None


class Notes:
    """A ledger that can be read. `refuses` stands for a database that is out of reach."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []
        self.refuses: OmniError | None = None

    def check_room(self) -> None:
        if self.refuses is not None:
            raise self.refuses

    def record(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)


class Service(SimpleNamespace):
    """What `deployments.http.Service` asks for."""

    async def is_ready(self) -> bool:
        return bool(self.ready)


def make_card(data: Path, name: str = "omnilmm-3b") -> ModelCard:
    return ModelCard(
        name=name,
        family=Family.OMNILMM_3B,
        fingerprint="f" * 64,
        dtype="float32",
        handling=InputHandling.SAFE,
        policy=ImagePolicy(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        max_context=200,
        vocab_size=820,
        template=load_template(Family.OMNILMM_3B, data / "minicpm-v-tiny"),
    )


def make_flow(card: ModelCard, decoder: Decoder, observer: Any = None) -> ChatFlow:
    observer = observer or Silence()
    return ChatFlow(
        card,
        preparer=InlinePreparer(ImageLimits()),
        store=open_store(CacheConfig(), secret=SECRET, observer=observer, clock=SystemClock(), sole=True),
        encoder=Encoder(),
        decoder=decoder,
        keys=KeyRing(SECRET),
        limits=ImageLimits(),
        observer=observer,
        clock=SystemClock(),
    )


def storage_parts(folder: Path) -> dict[str, Any]:
    """What a service has of files and batches, over a database and a folder of their own."""
    database = Database(f"sqlite:///{folder / 'records.db'}")
    storage = Storage(database, folder / "storage", max_tenant_bytes=1 << 30)
    return {
        "files": storage.files,
        "desk": storage.desk,
        "batch_endpoints": storage.endpoints,
        "max_upload_bytes": 1 << 20,
        "idempotency": IdempotencyStore(database),
    }


def make_service(flows: dict[str, ChatFlow], **changes: Any) -> Service:
    limits = ImageLimits(max_images=3)
    parts = {
        "keys": KeyBook(),
        "admins": AdminKeys(()),
        "limits": limits,
        "images": ImageReader(limits),
        "governor": Governor(SystemClock()),
        "places": Places(192),
        "lines": Lines(Silence()),
        "ledger": Notes(),
        "metrics": MetricsPage("replica-1"),
        # what only the routes of files, batches and admins ask for; they have tests of their own
        **dict.fromkeys(("directory", "usage_ledger", "files", "desk", "idempotency", "erase_picture")),
        "max_upload_bytes": 0,
        "batch_endpoints": (),
        "flows": flows,
        "started": 1_700_000_000,
        "max_body_bytes": 1 << 20,
        "request_timeout_s": 60.0,
        "ready": True,
    }
    return Service(**(parts | changes))


@asynccontextmanager
async def client_of(
    service: Service, peer: str = "127.0.0.1", **options: Any
) -> AsyncGenerator[httpx.AsyncClient, None]:
    transport = httpx.ASGITransport(make_app(service), client=(peer, 5000), **options)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def error_of(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) <= 512
    return response.status_code, error["code"], error["param"]
