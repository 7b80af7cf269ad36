"""The pictures of a request, from files to vectors a decoder can have.

    recognise    the alias of the file, or decoding it, tells what it shows; that names the key of its vectors
    look up      all keys at once: known, being made elsewhere, or ours to make
    obtain       wait for what others make, have the vision pool make what is ours, all side by side

A picture that appears several times in a request, be it as different files with the same pixels, is one here.
Vectors stay in the shared store; they pass through this process only where the store cannot be relied on.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass, field

from omnilmm.cache.key import KeyRing
from omnilmm.card import ModelCard
from omnilmm.config import ImageLimits
from omnilmm.errors import ImageError, OmniError, Overloaded, ReplicaLost
from omnilmm.image.source import check_picture, check_request_pixels, located
from omnilmm.messages import Embedding, Encoded, ImagePart, ImageSource, PixelIdentity, PreparedImage
from omnilmm.ports import Clock, EmbeddingStore, Encoder, Hit, ImagePreparer, Lease, Lookup
from omnilmm.retries import Deadline, Retries


@dataclass(slots=True)
class Picture:
    """A picture of one request. `key` names its vectors, from `recognise` on."""

    part: ImagePart
    identity: PixelIdentity | None = None
    prepared: PreparedImage | None = None
    key: str = ""
    source: ImageSource = ImageSource.CACHE
    embedding: Embedding | None = None  # only when it must travel by value
    seconds: float = 0.0  # from the lookup until its vectors could be had
    encode_s: float = 0.0  # of it, what the vision pool took, if this request had it encoded
    is_ready: bool = False  # its vectors could be had
    may_keep: bool = True  # whether the cache may keep them if this request has them made
    kept_bytes: int = 0  # what this request has put into the cache


@dataclass(slots=True)
class _Preparing:
    """A file on its way to pixels. Neither a picture nor an error: whoever decoded it left."""

    is_done: asyncio.Event = field(default_factory=asyncio.Event)
    prepared: PreparedImage | None = None
    error: OmniError | None = None


class Gathering:
    """What is still under way for the pictures of one request."""

    def __init__(self, pending_keys: Collection[str], work: asyncio.Task[None]) -> None:
        self.pending_keys = pending_keys
        """Keys of vectors that were not in the store when it was asked."""
        self._work = work

    async def complete(self) -> None:
        """Wait until all vectors can be had, by key or by value.

        Raises:
            OmniError: whatever befell the first picture that failed.
        """
        await self._work


class Gatherer:
    """Finds or makes the vectors of pictures, for one served model."""

    def __init__(
        self,
        card: ModelCard,
        *,
        preparer: ImagePreparer,
        store: EmbeddingStore,
        encoder: Encoder,
        keys: KeyRing,
        limits: ImageLimits,
        clock: Clock,
        retries: Retries,
    ) -> None:
        self._card = card
        self._preparer = preparer
        self._store = store
        self._encoder = encoder
        self._keys = keys
        self._limits = limits
        self._clock = clock
        self._retries = retries
        self._preparing: dict[bytes, _Preparing] = {}

    # -- recognise ------------------------------------------------------------------------------------

    async def recognise(self, parts: Sequence[ImagePart], scope: str, *, may_keep: bool = True) -> list[Picture]:
        """One Picture per part, in order; equal pictures are the same object. Without `may_keep` nothing that is
        found out or made of them is remembered.

        Raises:
            ImageError, PayloadTooLarge: a picture, or all of them together, cannot be taken.
        """
        if not parts:
            return []
        self._check_sizes(parts)
        digests = [hashlib.sha256(part.data).digest() for part in parts]
        pictures = [Picture(part, may_keep=may_keep) for part in parts]
        files = dict(zip(reversed(digests), reversed(pictures), strict=True))  # the first of equals counts
        await run_all(self._name(picture, digest, scope) for digest, picture in files.items())
        by_key: dict[str, Picture] = {}
        return [by_key.setdefault(files[digest].key, files[digest]) for digest in digests]

    def _check_sizes(self, parts: Sequence[ImagePart]) -> None:
        """Refuse by the headers alone what is too large, before any pixel is decoded."""
        sizes = []
        for part in parts:
            with located(part.param):
                sizes.append(check_picture(part.data, self._limits))
        check_request_pixels(sizes, self._limits, param=parts[-1].param)

    async def _name(self, picture: Picture, digest: bytes, scope: str) -> None:
        """Find out what a picture shows, from the alias of its file or by decoding it, and name its key."""
        card = self._card
        assert card.policy is not None, "the template lets no picture into a text-only model"
        alias = self._keys.alias_key(digest, scope=scope, decoding=card.policy.version)
        picture.identity = await self._store.get_identity(alias)
        if picture.identity is None:
            picture.identity = (await self._prepare(picture)).identity
            if picture.may_keep:
                await self._store.put_identity(alias, picture.identity)
        picture.key = self._keys.embedding_key(
            picture.identity,
            scope=scope,
            family=card.family,
            fingerprint=card.fingerprint,
            preprocessing=card.policy.version,
            dtype=card.dtype,
        )

    async def forget(self, data: bytes, scope: str) -> None:
        """Erase, in every tier, what a picture of this scope was turned into, and what its file was known to show.

        Raises:
            Overloaded: a tier could not be reached.
        """
        policy = self._card.policy
        if policy is None:
            return
        names = [self._keys.alias_key(hashlib.sha256(data).digest(), scope=scope, decoding=policy.version)]
        with suppress(ImageError):  # what cannot be decoded was never encoded
            (picture,) = await self.recognise([ImagePart(data, "file")], scope)
            names.append(picture.key)
        if not await self._store.erase(names):
            raise Overloaded("The cache cannot be reached, so the picture cannot be erased from it.", retry_after=5.0)

    async def _prepare(self, picture: Picture) -> PreparedImage:
        if picture.prepared is None:
            picture.prepared = await self._prepare_once(picture)
        return picture.prepared

    async def _prepare_once(self, picture: Picture) -> PreparedImage:
        """Decode, or wait for whoever decodes the same file at this moment."""
        digest = hashlib.sha256(picture.part.data).digest()
        while (other := self._preparing.get(digest)) is not None:
            await other.is_done.wait()
            if other.prepared is not None:
                return other.prepared
            if other.error is not None:
                error = copy(other.error)
                error.param = picture.part.param
                raise error
        mine = self._preparing[digest] = _Preparing()
        assert self._card.policy is not None
        try:
            mine.prepared = await self._preparer.prepare(
                picture.part.data, policy=self._card.policy, param=picture.part.param
            )
        except OmniError as error:
            mine.error = copy(error)
            raise
        finally:
            del self._preparing[digest]
            mine.is_done.set()
        return mine.prepared

    # -- obtain ---------------------------------------------------------------------------------------

    @property
    def can_announce(self) -> bool:
        """Whether a decoder may be given keys whose vectors are still in the making: it then meets the flights in
        the shared store, and waits there."""
        return self._store.is_shared

    @asynccontextmanager
    async def gather(self, pictures: Iterable[Picture], deadline: Deadline) -> AsyncIterator[Gathering]:
        """Look all keys up, and have what is missing made while the body runs. Leaving the body ends it all."""
        by_key = {picture.key: picture for picture in pictures}
        found = await self._store.lookup(list(by_key)) if by_key else {}
        work = asyncio.create_task(self._obtain_all(by_key, found, deadline), name="pictures")
        try:
            yield Gathering([key for key, answer in found.items() if not isinstance(answer, Hit)], work)
        finally:
            work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.exception()  # whoever wanted to know has asked `complete`
            for answer in found.values():
                if isinstance(answer, Lease):
                    await answer.abandon()  # a task that is cancelled before its first step has not done so

    async def _obtain_all(self, by_key: Mapping[str, Picture], found: Mapping[str, Lookup], deadline: Deadline) -> None:
        await run_all(self._obtain(by_key[key], answer, deadline) for key, answer in found.items())

    async def _obtain(self, picture: Picture, answer: Lookup, deadline: Deadline) -> None:
        """Turn what the store said about a key into vectors that the decoder can have."""
        begun = self._clock.monotonic()
        while not isinstance(answer, Hit):
            if isinstance(answer, Lease):
                await self._encode_under(answer, picture, deadline)
                break
            encoded = await answer.wait(deadline.remaining())
            if encoded is not None:
                picture.source, picture.embedding = ImageSource.FLIGHT, encoded.embedding
                break
            deadline.remaining()
            answer = (await self._store.lookup([picture.key]))[picture.key]
        picture.prepared = None  # three quarters of a megabyte that nobody needs any more
        picture.seconds, picture.is_ready = self._clock.monotonic() - begun, True

    async def _encode_under(self, lease: Lease, picture: Picture, deadline: Deadline) -> None:
        try:
            encoded = await self._encode(picture, deadline, by_value=not self._store.is_shared)
            if encoded.embedding is not None and not encoded.stored and picture.may_keep:
                # at least this process remembers
                await self._store.put(picture.key, encoded.embedding, seconds=encoded.seconds)
        except BaseException:
            await lease.abandon()
            raise
        picture.embedding = None if encoded.stored else encoded.embedding
        await lease.resolve(encoded)

    async def _encode(self, picture: Picture, deadline: Deadline, *, by_value: bool) -> Encoded:
        prepared, keep = await self._prepare(picture), picture.may_keep
        before = picture.kept_bytes
        for attempt in range(1, self._retries.max_attempts + 1):
            if keep:  # who leaves now does not hear whether the pool went on and stored them
                picture.kept_bytes = before + self._card.vector_bytes
            try:
                encoded = await self._encoder.encode(
                    prepared, key=picture.key, by_value=by_value or not keep, timeout_s=deadline.remaining(), keep=keep
                )
            except OmniError as error:
                picture.kept_bytes = before
                if not isinstance(error, ReplicaLost):
                    raise
                self._retries.check(error, "encode", attempt)
                continue
            picture.source = ImageSource.ENCODED
            picture.encode_s += encoded.seconds
            picture.kept_bytes = before + encoded.kept_bytes
            return encoded
        raise AssertionError("the last attempt raises")

    # -- by value -------------------------------------------------------------------------------------

    async def bring(self, missing: Collection[str], pictures: Iterable[Picture], deadline: Deadline) -> None:
        """The decoder could not find some vectors: they were evicted, or the store is away. Have them to send along."""
        wanted = {picture.key: picture for picture in pictures if picture.key in missing}
        await run_all(self._bring(picture, deadline) for picture in wanted.values() if picture.embedding is None)

    async def _bring(self, picture: Picture, deadline: Deadline) -> None:
        picture.embedding = await self._store.get(picture.key)
        if picture.embedding is None:
            picture.embedding = (await self._encode(picture, deadline, by_value=True)).embedding
            picture.prepared = None
        picture.is_ready = True


async def run_all(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Run coroutines side by side; the first failure cancels the others and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
