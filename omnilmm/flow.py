"""The one choreography: from a conversation to an answer, over small ports.

Over local objects this is the library (`pipeline`); over Ray Serve handles it is the cluster. The order of
steps is written here and nowhere else:

    render the prompt -> check its length -> recognise the pictures -> look their keys up ->
    encode what nobody has, wait for what others encode -> generate -> text

Text needs no pixels and pictures need no text, so the prompt is complete before the first picture is decoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from omnilmm.cache.key import KeyRing
from omnilmm.config import Family, ImageLimits, ImagePolicy, InputHandling
from omnilmm.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    OmniError,
    Overloaded,
    ReplicaLost,
)
from omnilmm.image.source import check_picture, check_request_pixels, located
from omnilmm.messages import (
    ChatRequest,
    Delta,
    Embedding,
    Encoded,
    Finished,
    FinishReason,
    GenerateCall,
    ImageInput,
    ImagePart,
    ImageSource,
    ImageUsage,
    PixelIdentity,
    Prefill,
    PreparedImage,
    Prompt,
    Sampling,
    TextLogprob,
    TokenBatch,
    TokenLogprob,
    Usage,
)
from omnilmm.observe import ImageResolved, Observer, RequestFinished, Retried
from omnilmm.ports import Clock, Decoder, EmbeddingStore, Encoder, Flight, Hit, ImagePreparer, Lease
from omnilmm.prompt.detokenize import Detokenizer, token_text
from omnilmm.prompt.template import Template

T = TypeVar("T")

CLIENT_LEFT = 499
"""The status noted for a request whose client closed the stream (nginx's convention)."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the flow must know of a served model; its weights stay in the pools.

    `fingerprint` names the encoder's weights, `dtype` the numbers its vectors are made of.
    """

    name: str
    family: Family
    fingerprint: str
    dtype: str
    handling: InputHandling
    policy: ImagePolicy | None
    max_context: int
    vocab_size: int
    template: Template


class RetryBudget:
    """Retries may add at most a tenth to the calls made, with a small reserve for quiet times.

    Envoy's retry budget, as a token bucket: each first try deposits 0.1, each retry withdraws 1.
    """

    def __init__(self, ratio: float = 0.1, reserve: float = 3.0) -> None:
        self._ratio, self._reserve = ratio, reserve
        self._balance = reserve

    def deposit(self) -> None:
        self._balance = min(self._balance + self._ratio, 10 * self._reserve)

    @property
    def balance(self) -> float:
        """Retries that could be made now."""
        return self._balance

    def try_withdraw(self) -> bool:
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True


@dataclass(slots=True)
class _Picture:
    """A picture of one request on its way to a key and to vectors."""

    part: ImagePart
    raw_digest: bytes
    identity: PixelIdentity | None = None
    prepared: PreparedImage | None = None
    key: str = ""
    source: ImageSource = ImageSource.CACHE
    embedding: Embedding | None = None  # only when it must travel by value
    seconds: float = 0.0  # until its vectors could be had


@dataclass(slots=True)
class _Progress:
    """What has happened to one request so far; lives as long as its stream."""

    begun: float
    deadline: float
    emitted: list[int] = field(default_factory=list)
    prefill: Prefill | None = None
    first_token: float | None = None
    finish: FinishReason | None = None


class ChatFlow:
    """Answers chat requests for one served model."""

    max_attempts = 3

    def __init__(
        self,
        card: ModelCard,
        *,
        preparer: ImagePreparer,
        store: EmbeddingStore,
        encoder: Encoder,
        decoder: Decoder,
        keys: KeyRing,
        limits: ImageLimits,
        observer: Observer,
        clock: Clock,
        retries: RetryBudget | None = None,
    ) -> None:
        self.card = card
        self._preparer = preparer
        self._store = store
        self._encoder = encoder
        self._decoder = decoder
        self._keys = keys
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._retries = retries or RetryBudget()

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta | Finished, None]:
        """Stream the answer: any number of Delta, then one Finished. Closing the generator frees everything.

        Raises:
            InvalidRequest and its kin: the conversation, a picture or the length cannot be served.
            Overloaded, DeadlineExceeded, ReplicaLost: we could not, this time.
        """
        now = self._clock.monotonic()
        progress = _Progress(begun=now, deadline=now + request.timeout_s)
        status = CLIENT_LEFT
        prompt: Prompt | None = None
        try:
            self._retries.deposit()
            prompt, sampling = self._compose(request)
            pictures = await self._gather(request, progress)
            batches = self._generate(request, prompt, sampling, pictures, progress)
            async with aclosing(batches):
                async for delta in self._spell(request, batches, progress):
                    yield delta
            assert progress.finish is not None
            status = 200
            usage = _usage(prompt, pictures, progress)
            for picture, told in zip(pictures, usage.images, strict=True):
                self._observer.emit(ImageResolved(self.card.name, told.source, picture.seconds))
            yield Finished(progress.finish, usage)
        except OmniError as error:
            status = error.status
            raise
        finally:
            self._note(status, prompt, progress)

    # -- words ----------------------------------------------------------------------------------------

    def _compose(self, request: ChatRequest) -> tuple[Prompt, Sampling]:
        template, card = self.card.template, self.card
        self._check_ids("logit_bias", [token_id for token_id, _ in request.logit_bias])
        self._check_ids("stop_token_ids", request.stop_ids)
        prompt = template.render(request.conversation, card.handling, max_tokens=card.max_context)
        room = card.max_context - len(prompt.ids)
        defaults = template.defaults
        wanted = request.max_tokens if request.max_tokens is not None else min(defaults.max_tokens, max(room, 1))
        if wanted > room:
            raise ContextLengthExceeded(
                f"This model's context is {card.max_context} tokens; the messages (with their pictures) take "
                f"{len(prompt.ids)} and {wanted} were asked for the answer.",
                param="messages",
            )

        eos = () if request.ignore_eos else template.eos_ids
        return prompt, Sampling(
            max_tokens=wanted,
            temperature=_or(request.temperature, defaults.temperature),
            top_k=_or(request.top_k, defaults.top_k),
            top_p=_or(request.top_p, defaults.top_p),
            min_p=_or(request.min_p, 0.0),
            repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            seed=_or(request.seed, secrets.randbits(63)),
            stop_ids=tuple(dict.fromkeys((*eos, *request.stop_ids))),
            min_tokens=request.min_tokens,
            logprobs=request.logprobs,
        )

    def _check_ids(self, param: str, ids: Sequence[int]) -> None:
        if any(not 0 <= token_id < self.card.vocab_size for token_id in ids):
            raise InvalidRequest(f"Token ids of this model are below {self.card.vocab_size}.", param=param)

    async def _spell(
        self, request: ChatRequest, batches: AsyncGenerator[TokenBatch, None], progress: _Progress
    ) -> AsyncGenerator[Delta, None]:
        """Tokens to text: whole characters, stop strings cut, log-probabilities kept beside their text."""
        tokenizer = self.card.template.tokenizer
        words = Detokenizer(tokenizer, skip_special=self.card.template.skip_special, stop=request.stop)
        held: list[TextLogprob] = []
        async for batch in batches:
            stopped_by_id = batch.finish is FinishReason.STOP
            shown = batch.ids[:-1] if stopped_by_id else batch.ids
            text = words.push(shown)
            held += [self._describe(i, p) for i, p in zip(shown, batch.logprobs, strict=False)]
            progress.finish = FinishReason.STOP if words.stopped else batch.finish
            if progress.finish is not None and not words.stopped:
                text += words.flush()
            if text or (held and progress.finish is not None):
                yield Delta(text, tuple(held))
                held = []
            if progress.finish is not None:
                return

    def _describe(self, token_id: int, logprob: TokenLogprob) -> TextLogprob:
        tokenizer = self.card.template.tokenizer
        top = tuple((*token_text(tokenizer, i), value) for i, value in logprob.top)
        return TextLogprob(*token_text(tokenizer, token_id), logprob.logprob, top)

    # -- pictures -------------------------------------------------------------------------------------

    async def _gather(self, request: ChatRequest, progress: _Progress) -> list[_Picture]:
        """Every picture recognised and its vectors findable, each distinct one asked for once."""
        parts = request.conversation.images
        if not parts:
            return []
        assert self.card.policy is not None, "the template lets no picture into a text-only model"
        self._check_sizes(parts)
        pictures = [_Picture(part, hashlib.sha256(part.data).digest()) for part in parts]
        distinct = {picture.raw_digest: picture for picture in pictures}
        await _all(self._recognise(picture, request.scope) for picture in distinct.values())
        by_key = {picture.key: picture for picture in distinct.values()}
        found = await self._store.lookup(list(by_key))
        await _all(self._obtain(by_key[key], answer, progress) for key, answer in found.items())
        for picture in pictures:
            twin = by_key[distinct[picture.raw_digest].key]
            picture.identity, picture.key = twin.identity, twin.key
            picture.source, picture.embedding, picture.seconds = twin.source, twin.embedding, twin.seconds
        return pictures

    def _check_sizes(self, parts: Sequence[ImagePart]) -> None:
        """Refuse by the headers alone what is too large, before any pixel is decoded."""
        sizes = []
        for part in parts:
            with located(part.param):
                sizes.append(check_picture(part.data, self._limits))
        check_request_pixels(sizes, self._limits, param=parts[-1].param)

    async def _recognise(self, picture: _Picture, scope: str) -> None:
        """Find out what the picture shows, from the alias of its file or by decoding it, and name its key."""
        card = self.card
        assert card.policy is not None
        alias = self._keys.alias_key(picture.raw_digest, scope=scope, decoding=card.policy.version)
        picture.identity = await self._store.get_identity(alias)
        if picture.identity is None:
            prepared = await self._prepare(picture)
            picture.identity = prepared.identity
            await self._store.put_identity(alias, prepared.identity)
        picture.key = self._keys.embedding_key(
            picture.identity,
            scope=scope,
            family=card.family,
            fingerprint=card.fingerprint,
            preprocessing=card.policy.version,
            dtype=card.dtype,
        )

    async def _prepare(self, picture: _Picture) -> PreparedImage:
        if picture.prepared is None:
            assert self.card.policy is not None
            picture.prepared = await self._preparer.prepare(
                picture.part.data, policy=self.card.policy, param=picture.part.param
            )
        return picture.prepared

    async def _obtain(self, picture: _Picture, answer: Hit | Lease | Flight, progress: _Progress) -> None:
        """Turn what the store said about a key into vectors that the decoder can have."""
        begun = self._clock.monotonic()
        while True:
            if isinstance(answer, Hit):
                picture.source = ImageSource.CACHE
                break
            if isinstance(answer, Flight):
                encoded = await answer.wait(self._remaining(progress))
                if encoded is not None:
                    picture.source, picture.embedding = ImageSource.FLIGHT, encoded.embedding
                    break
                self._remaining(progress)
                answer = (await self._store.lookup([picture.key]))[picture.key]
                continue
            await self._encode_under(answer, picture, progress)
            picture.source = ImageSource.ENCODED
            break
        picture.prepared = None  # three quarters of a megabyte that nobody needs any more
        picture.seconds = self._clock.monotonic() - begun

    async def _encode_under(self, lease: Lease, picture: _Picture, progress: _Progress) -> None:
        try:
            encoded = await self._encode(picture, progress, by_value=not self._store.is_shared)
            if encoded.embedding is not None and not encoded.stored:
                await self._store.put(picture.key, encoded.embedding)  # at least this process remembers
        except BaseException:
            await lease.abandon()
            raise
        await lease.resolve(encoded)
        picture.embedding = None if encoded.stored else encoded.embedding

    async def _encode(self, picture: _Picture, progress: _Progress, *, by_value: bool) -> Encoded:
        prepared = await self._prepare(picture)
        for attempt in range(1, self.max_attempts + 1):
            try:
                return await self._encoder.encode(
                    prepared, key=picture.key, by_value=by_value, timeout_s=self._remaining(progress)
                )
            except ReplicaLost as lost:
                self._check_retry(lost, "encode", attempt)
        raise AssertionError("the last attempt raises")

    # -- tokens ---------------------------------------------------------------------------------------

    async def _generate(
        self,
        request: ChatRequest,
        prompt: Prompt,
        sampling: Sampling,
        pictures: Sequence[_Picture],
        progress: _Progress,
    ) -> AsyncGenerator[TokenBatch, None]:
        """One seamless stream, however many replicas it takes."""
        attempt = 1
        while True:
            call = self._call(request, prompt, sampling, pictures, progress)
            missing: tuple[str, ...] = ()
            try:
                stream = self._decoder.generate(call, affinity=_affinity(request, pictures))
                async with aclosing(stream):
                    async for batch in stream:
                        missing = batch.missing
                        if missing:
                            break
                        self._advance(batch, progress)
                        yield batch
                        if batch.finish is not None:
                            return
                if not missing:
                    raise ReplicaLost("The decoder ended a stream early.")
            except ReplicaLost as lost:
                self._check_retry(lost, "decode", attempt)
            attempt += 1
            if attempt > self.max_attempts + 1:
                raise Overloaded("The picture's vectors could not be kept long enough to be used.", retry_after=1.0)
            if missing:
                await self._bring(missing, pictures, progress)

    def _call(
        self,
        request: ChatRequest,
        prompt: Prompt,
        sampling: Sampling,
        pictures: Sequence[_Picture],
        progress: _Progress,
    ) -> GenerateCall:
        images = tuple(
            ImageInput(pictures[span.image].key, span.start, span.length, pictures[span.image].embedding)
            for span in prompt.spans
        )
        return GenerateCall(
            request_id=request.request_id,
            prompt=prompt,
            images=images,
            sampling=sampling,
            emitted=tuple(progress.emitted),
            tenant=request.tenant,
            scope=request.scope,
            adapter=request.adapter,
            priority=request.priority,
            weight=request.weight,
            timeout_s=self._remaining(progress),
        )

    def _advance(self, batch: TokenBatch, progress: _Progress) -> None:
        if batch.prefill is not None and progress.prefill is None:
            progress.prefill = batch.prefill
        if batch.ids and progress.first_token is None:
            progress.first_token = self._clock.monotonic()
        progress.emitted += batch.ids

    async def _bring(self, missing: Sequence[str], pictures: Sequence[_Picture], progress: _Progress) -> None:
        """The decoder could not find some vectors: they were evicted, or the store is away. Send them by value."""
        for key in missing:
            owners = [picture for picture in pictures if picture.key == key]
            embedding = await self._store.get(key)
            if embedding is None:
                encoded = await self._encode(owners[0], progress, by_value=True)
                owners[0].prepared = None
                embedding = encoded.embedding
                for picture in owners:
                    picture.source = ImageSource.ENCODED
            for picture in owners:
                picture.embedding = embedding

    # -- time and retries -----------------------------------------------------------------------------

    def _remaining(self, progress: _Progress) -> float:
        left = progress.deadline - self._clock.monotonic()
        if left <= 0:
            raise DeadlineExceeded("The request ran out of its time.")
        return left

    def _check_retry(self, lost: ReplicaLost, stage: str, attempt: int) -> None:
        """Return if the call may be sent again; raise `lost` if it has been tried often enough."""
        if attempt >= self.max_attempts or not self._retries.try_withdraw():
            raise lost
        self._observer.emit(Retried(stage))

    def _note(self, status: int, prompt: Prompt | None, progress: _Progress) -> None:
        now = self._clock.monotonic()
        first = progress.first_token
        self._observer.emit(
            RequestFinished(
                model=self.card.name,
                status=status,
                seconds=now - progress.begun,
                ttft_s=None if first is None else first - progress.begun,
                prompt_tokens=0 if prompt is None else len(prompt.ids),
                completion_tokens=len(progress.emitted),
                cached_tokens=progress.prefill.num_cached_tokens if progress.prefill else 0,
                tokens_seconds=0.0 if first is None else now - first,
            )
        )


def _usage(prompt: Prompt, pictures: Sequence[_Picture], progress: _Progress) -> Usage:
    assert progress.prefill is not None
    in_kv = {prompt.spans[i].image for i in progress.prefill.kv_images}
    lengths = {span.image: span.length for span in prompt.spans}
    images = tuple(
        ImageUsage(
            source=ImageSource.KV if i in in_kv and picture.source is ImageSource.CACHE else picture.source,
            tokens=lengths.get(i, 0),
            width=picture.identity.width if picture.identity else None,
            height=picture.identity.height if picture.identity else None,
        )
        for i, picture in enumerate(pictures)
    )
    return Usage(
        prompt_tokens=len(prompt.ids),
        completion_tokens=len(progress.emitted),
        cached_tokens=progress.prefill.num_cached_tokens,
        image_tokens=sum(span.length for span in prompt.spans),
        images=images,
    )


def _or(asked: T | None, default: T) -> T:
    return default if asked is None else asked


def _affinity(request: ChatRequest, pictures: Sequence[_Picture]) -> str:
    """Same conversation, same value: its session if named, else its opening (first pictures and first words)."""
    if request.session is not None:
        opening = f"session/{request.session}"
    else:
        first = next((turn for turn in request.conversation.turns if turn.role == "user"), None)
        num_first = len(first.images) if first else 0
        opening = "/".join([*(p.key for p in pictures[:num_first]), first.text if first else ""])
    return hashlib.sha256(f"{request.scope}/{opening}".encode()).hexdigest()


async def _all(tasks: Iterable[Coroutine[None, None, None]]) -> None:
    """Run coroutines side by side; the first failure cancels the others and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(task)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


__all__ = ["CLIENT_LEFT", "ChatFlow", "ModelCard", "RetryBudget"]
