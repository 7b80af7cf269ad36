"""The pipeline cut in two for a batch on many machines: one stage reads and encodes pictures, one decodes answers.

Between them travel parcels: some lines, the pictures' files they need, and the vectors of those, each once however many
lines ask about it. The decode stage runs the whole flow and answers as one process would; only its two ports to the
world of pixels (`ImagePreparer`, `Encoder`) hand out what the parcel brought. A parcel is plain dicts of plain values.
Nothing here knows Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from omnilmm.config import CacheConfig, EncoderConfig, ImageLimits, ImagePolicy
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.encoder.loop import EncoderLoop
from omnilmm.engine.grammar import GrammarCompiler
from omnilmm.errors import NotFound, OmniError, ReplicaLost
from omnilmm.flow import ChatFlow
from omnilmm.gathering import Gatherer, Picture
from omnilmm.image.pool import InlinePreparer
from omnilmm.messages import Embedding, Encoded, ImagePart, ImageSource, PixelIdentity, PreparedImage
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import read_model_config
from omnilmm.models.device import pick_device
from omnilmm.models.packed import load_for_decoding
from omnilmm.models.weights import encoder_fingerprint, load_encoder
from omnilmm.observe import Silent
from omnilmm.pipeline import LocalDecoder, LocalEncoder, SystemClock, read_card, start_engine
from omnilmm.ports import EmbeddingStore
from omnilmm.retries import Deadline, Retries, RetryBudget

MAX_READING = 32
"""Lines of which the encode stage reads pictures at a time."""
ENCODE_TIMEOUT_S = 600.0
NOWHERE = Place(b"", b"", b"", "")

Parcel = Mapping[str, Any]
"""`lines` (number, endpoint, custom_id, body or refused), `files` (name, data), `pictures` (what each file shows, and
the key of its vectors), `vectors` (key and Embedding; `is_fresh` where they were made for this parcel)."""

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
        files = {_digest(data): data for line in opened for data in line.files}
        found = await asyncio.gather(*map(self._encode, files.values()))
        pictures = {digest: picture for digest, picture in zip(files, found, strict=True) if picture is not None}
        parcels = []
        fresh = {picture.picture.key for picture in pictures.values() if picture.picture.source is ImageSource.ENCODED}
        for first in range(0, len(opened), max_lines):
            lines = opened[first : first + max_lines]
            parcel = _parcel(lines, pictures, fresh)
            fresh -= {vector["key"] for vector in parcel["vectors"]}
            parcels.append(parcel)
        return parcels

    async def aclose(self) -> None:
        if self._vision is not None:
            self._vision.stop()
        await self._store.aclose()
        await self._reader.aclose()

    async def _open(self, row: Row) -> _Opened:
        request_id = secrets.token_hex(16)

        async def attempt() -> _Opened:
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
            return _Opened(row, refused=refused(row.custom_id, request_id, error))

    async def _read(self, row: Row) -> _Opened:
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
        return _Opened(row, body=shortened, files=tuple(files[param] for _, param in references))

    async def _encode(self, data: bytes) -> _Made | None:
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
        return None if embedding is None else _Made(data, picture, embedding)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A row that was read: its shortened body and its pictures' files, or the line of its refusal."""

    row: Row
    body: bytes | None = None
    files: tuple[bytes, ...] = ()
    refused: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Made:
    data: bytes
    picture: Picture
    embedding: Embedding


def _parcel(lines: Sequence[_Opened], made: Mapping[bytes, _Made], fresh: set[str]) -> Parcel:
    files = {_digest(data): data for line in lines for data in line.files}
    mine = {digest: made[digest] for digest in files if digest in made}
    by_key = {entry.picture.key: entry for entry in mine.values()}
    return {
        "lines": [
            {
                "number": line.row.number,
                "endpoint": line.row.endpoint,
                "custom_id": line.row.custom_id,
                "body": line.body,
                "refused": line.refused,
            }
            for line in lines
        ],
        "files": [{"name": file_name(data), "data": data} for data in files.values()],
        "pictures": [_shown(digest, entry.picture) for digest, entry in mine.items()],
        "vectors": [
            {
                "key": key,
                "dtype": entry.embedding.dtype,
                "rows": entry.embedding.shape[0],
                "columns": entry.embedding.shape[1],
                "data": entry.embedding.data,
                "seconds": entry.picture.encode_s,
                "is_fresh": key in fresh,
            }
            for key, entry in by_key.items()
        ],
    }


def _shown(file_digest: bytes, picture: Picture) -> dict[str, Any]:
    identity = picture.identity
    assert identity is not None
    shows = {"digest": identity.digest, "width": identity.width, "height": identity.height}
    return {"file": file_digest, "key": picture.key, **shows}


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
        self._carried = _Carried()
        flow = ChatFlow(
            card,
            preparer=_CarriedPixels(self._carried),
            store=self._store,
            encoder=_CarriedVectors(self._carried, self._store),
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
                    await self._store.put(vector["key"], _embedding(vector), seconds=vector["seconds"])
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


class _Carried:
    """What the parcels at hand brought along. Reads pictures' files for requests (`image.reader.FileReader`)."""

    def __init__(self) -> None:
        self._parcels: list[tuple[dict[str, bytes], dict[bytes, PixelIdentity], dict[str, Mapping[str, Any]]]] = []

    @contextmanager
    def holding(self, parcel: Parcel) -> Iterator[None]:
        files = {file["name"]: file["data"] for file in parcel["files"]}
        shown = {p["file"]: PixelIdentity(p["digest"], p["width"], p["height"]) for p in parcel["pictures"]}
        held = files, shown, {vector["key"]: vector for vector in parcel["vectors"]}
        self._parcels.append(held)
        try:
            yield
        finally:
            self._parcels = [other for other in self._parcels if other is not held]

    async def read(self, tenant: str, file_id: str) -> bytes:
        for files, _, _ in self._parcels:
            if file_id in files:
                return files[file_id]
        raise NotFound("There is no such file.", code="file_not_found")

    def try_identity(self, data: bytes) -> PixelIdentity | None:
        digest = _digest(data)
        return next((shown[digest] for _, shown, _ in self._parcels if digest in shown), None)

    def try_vector(self, key: str) -> Mapping[str, Any] | None:
        return next((vectors[key] for _, _, vectors in self._parcels if key in vectors), None)


class _CarriedPixels:
    """ports.ImagePreparer that knows what a picture shows without its pixels. One that could not be encoded is decoded
    here after all, to be refused for what is wrong with it."""

    def __init__(self, carried: _Carried) -> None:
        self._carried, self._inline = carried, InlinePreparer(ImageLimits())

    async def prepare(self, data: bytes, *, policy: ImagePolicy, param: str) -> PreparedImage:
        identity = self._carried.try_identity(data)
        if identity is None:
            return await self._inline.prepare(data, policy=policy, param=param)
        return PreparedImage(identity, policy.side, b"")


class _CarriedVectors:
    """ports.Encoder that encodes nothing."""

    def __init__(self, carried: _Carried, store: EmbeddingStore) -> None:
        self._carried, self._store = carried, store

    async def encode(
        self, picture: PreparedImage, *, key: str, by_value: bool, timeout_s: float, keep: bool = True
    ) -> Encoded:
        vector = self._carried.try_vector(key)
        if vector is None:
            raise ReplicaLost("The picture could not be encoded.")
        embedding, seconds = _embedding(vector), float(vector["seconds"])
        stored = await self._store.put(key, embedding, seconds=seconds)
        return Encoded(embedding if by_value or not stored else None, stored=stored, seconds=seconds)


def shorten(value: Any, names: Mapping[str, str]) -> Any:
    """A body in which references to pictures are replaced by the names of their files."""
    if isinstance(value, list):
        return [shorten(item, names) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: names.get(item, item)
        if key in ("url", "image_url", "file_id") and isinstance(item, str)
        else shorten(item, names)
        for key, item in value.items()
    }


def file_name(data: bytes) -> str:
    """An id as uploaded files have them."""
    return f"file-{_digest(data).hex()}"


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _embedding(vector: Mapping[str, Any]) -> Embedding:
    return Embedding(vector["dtype"], (vector["rows"], vector["columns"]), vector["data"])


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
