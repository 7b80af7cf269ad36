"""The one choreography: from a conversation to an answer, over small ports.

Over local objects this is the library (`pipeline`); over Ray Serve handles it is the cluster. The order of
steps is written here and nowhere else:

    compose the prompt, check its length -> recognise the pictures -> look their keys up ->
    have made what nobody has, wait for what others make -> generate -> text

Text needs no pixels and pictures need no text, so the prompt is complete before the first picture is decoded. Where
it pays, the decoder is asked before the last picture is encoded: it computes what comes before that picture, and waits
for the vectors by itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from omnilmm.cache.key import KeyRing
from omnilmm.card import ModelCard
from omnilmm.composing import affinity, compose, compose_prompt
from omnilmm.config import ImageLimits
from omnilmm.errors import OmniError, Overloaded, ReplicaLost
from omnilmm.gathering import Gatherer, Gathering, Picture
from omnilmm.messages import (
    ChatRequest,
    Delta,
    Finished,
    FinishReason,
    GenerateCall,
    ImageInput,
    ImageSource,
    ImageUsage,
    Prefill,
    Prompt,
    Sampling,
    TokenBatch,
    Usage,
)
from omnilmm.observe import ImageResolved, Observer, RequestFinished
from omnilmm.ports import Clock, Decoder, EmbeddingStore, Encoder, ImagePreparer
from omnilmm.prompt.spelling import Speller
from omnilmm.retries import Deadline, Retries, RetryBudget

CLIENT_LEFT = 499
"""The status noted for a request whose client closed the stream (nginx's convention)."""

MIN_TOKENS_AHEAD = 128
"""With fewer tokens in front of it, a picture in the making is not worth a place in the decoder's queue, where it
would stand in the way of requests that need no picture."""

_NOTHING = Usage(0, 0, 0, 0)


@dataclass(slots=True)
class _Answer:
    """One request and what has come of it so far; lives as long as its stream."""

    request: ChatRequest
    begun: float
    deadline: Deadline
    prompt: Prompt
    sampling: Sampling
    pictures: Sequence[Picture] = ()
    emitted: list[int] = field(default_factory=list)
    prefill: Prefill | None = None
    first_token: float | None = None
    last_token: float | None = None
    embedding_bytes: int = 0
    finish: FinishReason | None = None
    usage: Usage | None = None


class ChatFlow:
    """Answers chat requests for one served model."""

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
        self.decoder = decoder
        self._observer = observer
        self._clock = clock
        self._retries = Retries(retries or RetryBudget(), observer)
        self._gatherer = Gatherer(
            card,
            preparer=preparer,
            store=store,
            encoder=encoder,
            keys=keys,
            limits=limits,
            clock=clock,
            retries=self._retries,
        )

    async def answer(
        self, request: ChatRequest, *, account: Callable[[Usage], None] | None = None
    ) -> AsyncGenerator[Delta | Finished, None]:
        """Stream the answer: any number of Delta, then one Finished. Closing the generator frees everything.

        `account` is told once, when it is over, what it took: all of it, or what came of it until it was closed or
        failed.

        Raises:
            InvalidRequest and its kin: the conversation, a picture or the length cannot be served.
            Overloaded, DeadlineExceeded, ReplicaLost: we could not, this time.
        """
        begun, deadline = self._clock.monotonic(), Deadline(self._clock, request.timeout_s)
        status = CLIENT_LEFT
        answer: _Answer | None = None
        try:
            self._retries.note_request()
            answer = _Answer(request, begun, deadline, *compose(self.card, request))
            answer.pictures = await self._gatherer.recognise(
                request.conversation.images, request.scope, may_keep=request.may_cache
            )
            async with self._gatherer.gather(answer.pictures, deadline) as gathering:
                if not self._can_begin(answer, gathering):
                    await gathering.complete()
                batches = self._generate(answer, gathering)
                async with aclosing(batches):
                    async for delta in self._spell(answer, batches):
                        yield delta
            status = 200
            assert answer.finish is not None
            answer.usage = _usage(answer)
            yield Finished(answer.finish, answer.usage)
        except Exception as error:
            status = error.status if isinstance(error, OmniError) else OmniError.status
            raise
        finally:
            usage = _NOTHING if answer is None else answer.usage or _usage(answer)
            self._note(status, begun, answer, usage)
            if account is not None:
                account(usage)

    async def forget(self, data: bytes, *, scope: str) -> None:
        """Erase what this model made of a picture (the bytes of its file) from every tier of the cache.

        Raises:
            Overloaded: a tier could not be reached; ask again.
        """
        await self._gatherer.forget(data, scope)

    def count(self, request: ChatRequest) -> Prompt:
        """The prompt of a request, without answering it. Its pictures are counted, not looked at.

        Raises:
            InvalidRequest and its kin: the conversation or the length cannot be served.
        """
        return compose_prompt(self.card, request)

    # -- tokens and their text ------------------------------------------------------------------------

    async def _spell(self, answer: _Answer, batches: AsyncGenerator[TokenBatch, None]) -> AsyncGenerator[Delta, None]:
        words = Speller(self.card.template, stop=answer.request.stop)
        async for batch in batches:
            delta = words.push(batch)
            answer.finish = words.finish
            if delta is not None:
                yield delta
            if answer.finish is not None:
                return

    def _can_begin(self, answer: _Answer, gathering: Gathering) -> bool:
        """Whether to ask the decoder while pictures are in the making, because it can do something meanwhile.

        That is when a long text comes before them, or when it may hold them in its KV pool from an earlier turn,
        whatever has become of the store.
        """
        spans = (span for span in answer.prompt.spans if answer.pictures[span.image].key in gathering.pending_keys)
        first = next(spans, None)
        if first is None:
            return True
        if not (self._gatherer.can_announce and answer.request.may_cache):
            return False  # they will not come through the store
        has_earlier_turn = any(turn.role == "assistant" for turn in answer.request.conversation.turns)
        return has_earlier_turn or first.start >= MIN_TOKENS_AHEAD

    async def _generate(self, answer: _Answer, gathering: Gathering) -> AsyncGenerator[TokenBatch, None]:
        """One seamless stream, however many replicas it takes."""
        meets = affinity(answer.request, answer.prompt, [picture.key for picture in answer.pictures])
        attempt = 1
        while True:
            missing: tuple[str, ...] = ()
            try:
                stream = self.decoder.generate(self._call(answer), affinity=meets)
                async with aclosing(stream):
                    async for batch in stream:
                        missing = batch.missing
                        if missing:
                            break
                        self._advance(answer, batch)
                        yield batch
                        if batch.finish is not None:
                            return
                if not missing:
                    raise ReplicaLost("The decoder ended a stream early.")
            except ReplicaLost as lost:
                self._retries.check(lost, "decode", attempt, resuming=bool(answer.emitted))
            attempt += 1
            if attempt > self._retries.max_attempts + 1:
                raise Overloaded("The picture's vectors could not be kept long enough to be used.", retry_after=1.0)
            if missing:
                await gathering.complete()  # what the decoder waited for may have failed
                await self._gatherer.bring(missing, answer.pictures, answer.deadline)

    def _call(self, answer: _Answer) -> GenerateCall:
        """The call as it stands: with what was emitted so far, and the vectors that must travel by value."""
        request, pictures = answer.request, answer.pictures
        images = tuple(
            ImageInput(pictures[span.image].key, span.start, span.length, pictures[span.image].embedding)
            for span in answer.prompt.spans
        )
        answer.embedding_bytes += sum(len(image.embedding.data) for image in images if image.embedding is not None)
        return GenerateCall(
            request_id=request.request_id,
            prompt=answer.prompt,
            images=images,
            sampling=answer.sampling,
            emitted=tuple(answer.emitted),
            tenant=request.tenant,
            scope=request.scope,
            adapter=request.adapter,
            priority=request.priority,
            weight=request.weight,
            timeout_s=answer.deadline.remaining(),
        )

    def _advance(self, answer: _Answer, batch: TokenBatch) -> None:
        if batch.prefill is not None:
            answer.embedding_bytes += batch.prefill.fetched_bytes
            answer.prefill = answer.prefill or batch.prefill
        if batch.ids:
            answer.last_token = self._clock.monotonic()
            answer.first_token = answer.last_token if answer.first_token is None else answer.first_token
        answer.emitted += batch.ids

    # -- the end --------------------------------------------------------------------------------------

    def _note(self, status: int, begun: float, answer: _Answer | None, usage: Usage) -> None:
        """Tell the observer, in the same numbers as the account; a prompt that is asked several times counts once."""
        now = self._clock.monotonic()
        first = answer.first_token if answer else None
        counts_prompt = answer is not None and not answer.request.is_further
        if answer is not None and counts_prompt:
            for picture, told in zip(_met(answer), usage.images, strict=True):
                self._observer.emit(ImageResolved(self.card.name, told.source, picture.seconds))
        self._observer.emit(
            RequestFinished(
                model=self.card.name,
                status=status,
                seconds=now - begun,
                ttft_s=None if first is None else first - begun,
                prompt_tokens=usage.prompt_tokens if counts_prompt else 0,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens if counts_prompt else 0,
                tokens_seconds=0.0 if first is None else now - first,
            )
        )


def _met(answer: _Answer) -> Sequence[Picture]:
    """The pictures of an answer that count: all, once the decoder has read them, else those whose vectors are there."""
    if answer.prefill is not None:
        return answer.pictures
    return [picture for picture in answer.pictures if picture.is_ready]


def _usage(answer: _Answer) -> Usage:
    """What the answer took so far. A prompt counts when its first token is there."""
    spans, prefill, first, last = answer.prompt.spans, answer.prefill, answer.first_token, answer.last_token
    in_kv = {spans[i].image for i in prefill.kv_images} if prefill is not None else ()
    lengths = {span.image: span.length for span in spans}
    images = tuple(
        ImageUsage(
            source=ImageSource.KV if i in in_kv and picture.source is ImageSource.CACHE else picture.source,
            tokens=lengths.get(i, 0),
            width=picture.identity.width if picture.identity else None,
            height=picture.identity.height if picture.identity else None,
        )
        for i, picture in enumerate(_met(answer))
    )
    distinct = {picture.key: picture for picture in answer.pictures}.values()
    return Usage(
        prompt_tokens=0 if prefill is None else len(answer.prompt.ids),
        completion_tokens=len(answer.emitted),
        cached_tokens=0 if prefill is None else prefill.num_cached_tokens,
        image_tokens=0 if prefill is None else sum(span.length for span in spans),
        images=images,
        encode_s=sum(picture.encode_s for picture in distinct),
        decode_s=0.0 if first is None or last is None else last - first,
        embedding_bytes=answer.embedding_bytes,
        kept_bytes=sum(picture.kept_bytes for picture in distinct),
    )
