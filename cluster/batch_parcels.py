"""What travels between the two stages of a batch on many machines: how it is packed, and what is handed out of it.

A parcel is some lines, the pictures' files they need, and the vectors of those, each once however many lines ask about
it. It is plain dicts of plain values. The stage that gets it reads of the world of pictures only what it brought.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from omnilmm.batch.sources import Row
from omnilmm.config import ImageLimits, ImagePolicy
from omnilmm.errors import NotFound, ReplicaLost
from omnilmm.gathering import Picture
from omnilmm.image.pool import InlinePreparer
from omnilmm.messages import Embedding, Encoded, PixelIdentity, PreparedImage
from omnilmm.ports import EmbeddingStore

Parcel = Mapping[str, Any]
"""`lines` (number, endpoint, custom_id, body or refused), `files` (name, data), `pictures` (what each file shows, and
the key of its vectors), `vectors` (key and Embedding; `is_fresh` where they were made for this parcel)."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A row that was read: its shortened body and its pictures' files, or the line of its refusal."""

    row: Row
    body: bytes | None = None
    files: tuple[bytes, ...] = ()
    refused: bytes | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """A picture and its vectors."""

    picture: Picture
    embedding: Embedding


def pack(lines: Sequence[Opened], made: Mapping[bytes, Made], fresh: Set[str]) -> Parcel:
    """The lines with all they need.

    Args:
        made: pictures that have vectors, by the digest of their file.
        fresh: keys of vectors that are made for these lines.
    """
    files = {digest_of(data): data for line in lines for data in line.files}
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


class Carried:
    """What the parcels at hand brought along. Reads pictures' files for requests (`image.reader.FileReader`)."""

    def __init__(self) -> None:
        self._parcels: list[tuple[dict[str, bytes], dict[bytes, PixelIdentity], dict[str, Mapping[str, Any]]]] = []

    @contextmanager
    def holding(self, parcel: Parcel) -> Iterator[None]:
        """The parcel is at hand inside."""
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
        digest = digest_of(data)
        return next((shown[digest] for _, shown, _ in self._parcels if digest in shown), None)

    def try_vector(self, key: str) -> Mapping[str, Any] | None:
        return next((vectors[key] for _, _, vectors in self._parcels if key in vectors), None)


class CarriedPixels:
    """ports.ImagePreparer that knows what a picture shows without its pixels. One that could not be encoded is decoded
    here after all, to be refused for what is wrong with it."""

    def __init__(self, carried: Carried) -> None:
        self._carried, self._inline = carried, InlinePreparer(ImageLimits())

    async def prepare(self, data: bytes, *, policy: ImagePolicy, param: str) -> PreparedImage:
        identity = self._carried.try_identity(data)
        if identity is None:
            return await self._inline.prepare(data, policy=policy, param=param)
        return PreparedImage(identity, policy.side, b"")


class CarriedVectors:
    """ports.Encoder that encodes nothing."""

    def __init__(self, carried: Carried, store: EmbeddingStore) -> None:
        self._carried, self._store = carried, store

    async def encode(
        self, picture: PreparedImage, *, key: str, by_value: bool, timeout_s: float, keep: bool = True
    ) -> Encoded:
        vector = self._carried.try_vector(key)
        if vector is None:
            raise ReplicaLost("The picture could not be encoded.")
        embedding, seconds = embedding_of(vector), float(vector["seconds"])
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
    return f"file-{digest_of(data).hex()}"


def digest_of(data: bytes) -> bytes:
    """What names a file of this content."""
    return hashlib.sha256(data).digest()


def embedding_of(vector: Mapping[str, Any]) -> Embedding:
    """One of a parcel's `vectors`."""
    return Embedding(vector["dtype"], (vector["rows"], vector["columns"]), vector["data"])
