"""The pipeline cut in two for a batch on many machines: one stage reads and encodes pictures, one decodes answers.

Between them travel parcels (`batch_parcels`). The decode stage runs the whole flow and answers as one process would;
only its two ports to the world of pixels (`ImagePreparer`, `Encoder`) hand out what the parcel brought. Nothing here
knows Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cluster.batch_parcels import (
    Carried,
    CarriedPixels,
    CarriedVectors,
    Made,
    Opened,
    Parcel,
    digest_of,
    embedding_of,
    file_name,
    pack,
    shorten,
)
from cluster.batch_service import TENANT, Load, LocalService, open_reader
from omnilmm.api.endpoints import ENDPOINTS
from omnilmm.batch.offline import answer_row
from omnilmm.batch.order import Place
from omnilmm.batch.pace import Pace
from omnilmm.batch.results import refused
from omnilmm.batch.sources import Row
from omnilmm.cache.key import KeyRing
from omnilmm.cache.store import open_store
from omnilmm.card import ModelCard
from omnilmm.config import CacheConfig, EncoderConfig, ImageLimits
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.encoder.loop import EncoderLoop
from omnilmm.engine.grammar import GrammarCompiler
from omnilmm.errors import OmniError
from omnilmm.flow import ChatFlow
from omnilmm.gathering import Gatherer
from omnilmm.image.pool import InlinePreparer
from omnilmm.messages import ImagePart, ImageSource
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import read_model_config
from omnilmm.models.device import pick_device
from omnilmm.models.packed import load_for_decoding
from omnilmm.models.weights import encoder_fingerprint, load_encoder
from omnilmm.observe import Silent
from omnilmm.pipeline import LocalDecoder, LocalEncoder, SystemClock, read_card, start_engine
from omnilmm.retries import Deadline, Retries, RetryBudget

MAX_READING = 32
"""Lines of which the encode stage reads pictures at a time."""
ENCODE_TIMEOUT_S = 600.0
NOWHERE = Place(b"", b"", b"", "")

_log = logging.getLogger(__name__)


class EncodeStage:
    """Reads the bodies of rows and their pictures, and encodes those; one for each worker of the encode pool.

    Args:
        load: what is loaded of the model is its vision tower alone.
        secret: names the vectors; the same for both stages.
    """

    def __init__(self, load: Load, secret: bytes) -> None:
        self._card = _read_card(load)
        self._reader = open_reader(load.hosts)
        self._pace = Pace(max_running=MAX_READING)
        self._store = open_store(CacheConfig(), secret=secret, observer=Silent(), clock=SystemClock(), sole=True)
        self._gatherer: Gatherer | None = None
        self._vision: EncoderLoop | None = None
        if self._card.policy is not None:
            folder = resolve_checkpoint(load.path)
            tower = load_encoder(folder, read_model_config(folder), dtype=load.dtype, device=pick_device(load.device))
            self._vision = EncoderLoop(VisionEncoder(tower, self._card.policy), EncoderConfig(), Silent())
            self._vision.start()
            self._gatherer = Gatherer(
                self._card,
                preparer=InlinePreparer(ImageLimits()),
                store=self._store,
                encoder=LocalEncoder(self._vision, self._store),
                keys=KeyRing(secret),
                limits=ImageLimits(),
                clock=SystemClock(),
                retries=Retries(RetryBudget(), Silent()),
            )

    async def pack(self, rows: Sequence[Row], *, max_lines: int) -> list[Parcel]:
        """Parcels of at most so many lines. A picture that lines of several of them need goes with each."""
        opened = await asyncio.gather(*map(self._open, rows))
        files = {digest_of(data): data for line in opened for data in line.files}
        found = await asyncio.gather(*map(self._encode, files.values()))
        pictures = {digest: picture for digest, picture in zip(files, found, strict=True) if picture is not None}
        parcels = []
        fresh = {picture.picture.key for picture in pictures.values() if picture.picture.source is ImageSource.ENCODED}
        for first in range(0, len(opened), max_lines):
            lines = opened[first : first + max_lines]
            parcel = pack(lines, pictures, fresh)
            fresh -= {vector["key"] for vector in parcel["vectors"]}
            parcels.append(parcel)
        return parcels

    async def aclose(self) -> None:
        if self._vision is not None:
            self._vision.stop()
        await self._store.aclose()
        await self._reader.aclose()

    async def _open(self, row: Row) -> Opened:
        request_id = secrets.token_hex(16)

        async def attempt() -> Opened:
            try:
                return await self._read(row)
            except OmniError:
                raise
            except Exception as error:
                _log.exception("a row could not be read")
                raise OmniError("unforeseen") from error

        try:
            return await self._pace.run(attempt)
        except OmniError as error:
            return Opened(row, refused=refused(row.custom_id, request_id, error))

    async def _read(self, row: Row) -> Opened:
        """The body, its pictures' files taken out of it. Raises OmniError, as it would be refused over HTTP."""
        document = row.body()
        body = ENDPOINTS[row.endpoint](document)
        references = list(body.pictures())
        try:
            files = await self._reader.read_all(references, tenant=TENANT)
        except OmniError as error:
            error.param = body.place(error.param)
            raise
        names = {reference: file_name(files[param]) for reference, param in references}
        shortened = json.dumps(shorten(document, names)).encode()
        return Opened(row, body=shortened, files=tuple(files[param] for _, param in references))

    async def _encode(self, data: bytes) -> Made | None:
        """The picture and its vectors; None where there are none to be had, of which the decode stage learns why."""
        if self._gatherer is None:
            return None
        try:
            (picture,) = await self._gatherer.recognise([ImagePart(data, "")], TENANT)
            deadline = Deadline(SystemClock(), ENCODE_TIMEOUT_S)
            async with self._gatherer.gather([picture], deadline) as gathering:
                await gathering.complete()
            embedding = picture.embedding or await self._store.get(picture.key)
        except OmniError:
            return None
        return None if embedding is None else Made(picture, embedding)


class DecodeStage:
    """Answers the lines of parcels; one for each worker of the decode pool.

    Args:
        load: what is loaded of the model is its language model alone.
        secret: the one the encode stage has.
        max_running: lines at a time, over all parcels.
    """

    def __init__(self, load: Load, secret: bytes, *, max_running: int) -> None:
        folder = resolve_checkpoint(load.path)
        config = read_model_config(folder)
        engine = load.engine.resolve(max_context=config.max_context)
        language = load_for_decoding(folder, config, dtype=load.dtype, device=pick_device(load.device))
        card = _read_card(load, max_context=min(config.max_context, engine.num_blocks * engine.block_size))
        grammars = GrammarCompiler(card.template.tokenizer, vocab_size=card.vocab_size)
        self._loop = start_engine(language, engine, Silent(), grammars=grammars)
        self._store = open_store(CacheConfig(), secret=secret, observer=Silent(), clock=SystemClock(), sole=True)
        self._carried = Carried()
        flow = ChatFlow(
            card,
            preparer=CarriedPixels(self._carried),
            store=self._store,
            encoder=CarriedVectors(self._carried, self._store),
            decoder=LocalDecoder(self._loop, self._store),
            keys=KeyRing(secret),
            limits=ImageLimits(),
            observer=Silent(),
            clock=SystemClock(),
        )
        self._service = LocalService({load.name: flow}, open_reader(files=self._carried))
        self._pace = Pace(max_running=max_running)

    async def answer(self, parcel: Parcel) -> list[dict[str, Any]]:
        """`number`, `is_success` and `result`, the line for the output, of every line."""
        with self._carried.holding(parcel):
            for vector in parcel["vectors"]:
                if not vector["is_fresh"]:
                    await self._store.put(vector["key"], embedding_of(vector), seconds=vector["seconds"])
            return list(await asyncio.gather(*map(self._answer_line, parcel["lines"])))

    async def aclose(self) -> None:
        self._loop.stop()
        await self._store.aclose()
        await self._service.aclose()

    async def _answer_line(self, line: Mapping[str, Any]) -> dict[str, Any]:
        if line["refused"] is not None:
            return {"number": line["number"], "is_success": False, "result": line["refused"]}
        body = partial(json.loads, line["body"])
        row = Row(line["number"], line["custom_id"], line["endpoint"], NOWHERE, body)
        done = await answer_row(row, self._service.ask, self._pace)
        return {"number": line["number"], "is_success": done.body is not None, "result": done.result}


def _read_card(load: Load, *, max_context: int | None = None) -> ModelCard:
    folder = resolve_checkpoint(load.path)
    config = read_model_config(folder)
    return read_card(
        load.name,
        folder,
        config,
        dtype=load.dtype,
        handling=load.handling,
        fingerprint=encoder_fingerprint(folder, config) if config.vision is not None else "",
        max_context=max_context or config.max_context,
    )
